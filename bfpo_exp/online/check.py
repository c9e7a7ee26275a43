"""What can be known to be wrong with a run of ``loss=morl`` before any compute is spent."""

from __future__ import annotations

from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.models.policy import architecture
from bfpo_exp.online.settings import Morl

# Fields of a config with which the output layer is more than a matrix.
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_online(config: Config) -> None:
    """A `UserError` for what sampling from the policy while it trains does not go with."""
    settings = Morl.model_validate(config.loss.hyperparameters)
    shape = architecture(config.model)
    for field in AFTER_THE_HEAD:
        if getattr(shape, field, None) not in (None, 1.0):
            raise UserError(
                "loss=morl takes log-probs from the output layer's matrix, and a model of type "
                f"{shape.model_type} has {field}={getattr(shape, field)} after it"
            )
    positions = getattr(shape, "max_position_embeddings", None)
    longest = config.data.format.max_prompt_length + settings.max_new_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"data.format.max_prompt_length + loss.max_new_tokens = {longest} tokens, but the model "
            f"{config.model.name} has {positions} positions"
        )
