"""Policies: causal language models of transformers, and which of their weights are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bfpo_exp.config.schema import Model
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.models.numerics import DTYPES, check_numerics, resolved_attention, tell_numerics

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def is_local(path: str) -> bool:
    """Whether a model's path means a folder rather than a hub id (``owner/name``)."""
    return path.startswith(("/", ".")) or path.count("/") > 1 or Path(path).exists()


def check_model(config: Model) -> None:
    """A `UserError` for a path that holds no model, before anything is loaded.

    So for a dtype or an attention that this machine does not have.  A hub id is looked up through its
    ``config.json``, cached or from the hub.
    """
    check_numerics(config)
    if config.path is None:
        return
    if not is_local(config.path):
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path={config.path!r} is neither a folder nor a model that can be had from the "
                f"hub ({str(error).splitlines()[0]})"
            ) from None
        return
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"model.path={config.path!r} is no model: there is no such folder")
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights (*.safetensors)")):
        if not any(folder.glob(pattern)):
            raise UserError(
                f"model.path={config.path!r} is no model: it holds no {what}; expected a folder written "
                "by save_pretrained"
            )


def weights_fingerprint(config: Model) -> str:
    """What identifies pretrained weights: hub id and commit, or the files of a folder.

    Small files are taken by content, weight files by name, size and time of change, so that a
    folder of many gigabytes costs nothing to name.
    """
    assert config.path is not None
    if not is_local(config.path):
        return f"{config.path}@{getattr(architecture(config), '_commit_hash', None) or config.revision}"
    digest = hashlib.sha256()
    for file in sorted(Path(config.path).iterdir()):
        if file.suffix == ".safetensors":
            status = file.stat()
            digest.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}".encode())
        elif file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"}:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def architecture(config: Model, **fields: Any) -> PreTrainedConfig:
    """The transformers config of the model: of ``path``, or of ``architecture`` with more fields.

    Raises `UserError` for fields that transformers does not take, and for pretrained weights of
    another shape than the config declares.
    """
    from transformers import AutoConfig

    if config.path is None:
        return _made_config("architecture", {**(config.architecture or {}), **fields})
    found = AutoConfig.from_pretrained(
        config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    for name, declared in (config.shape or {}).items():
        if (actual := getattr(found, name, None)) != declared:
            raise UserError(
                f"model.shape.{name}={declared}, but the model at model.path={config.path!r} has {actual}; "
                "set model.shape to its own, or to null"
            )
    return found


def declared_architecture(config: Model, **fields: Any) -> PreTrainedConfig | None:
    """The transformers config as far as it is known without the weights; None where it is not.

    That is ``shape``, else ``architecture`` with more fields, else the file in a local folder.
    """
    if config.shape is not None:
        return _made_config("shape", config.shape)
    if config.path is not None and not Path(config.path, "config.json").is_file():
        return None
    return architecture(config, **fields)


def _made_config(key: str, fields: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.{key}={fields}: {str(error).splitlines()[0]}") from None


def without_weights(shape: PreTrainedConfig, config: Model) -> PreTrainedModel:
    """The model on the meta device: every parameter has its shape, and none takes memory."""
    with torch.device("meta"):
        return _from_config(shape, config)


def check_trainable(config: Model, *several: Literal["all"] | Sequence[str]) -> None:
    """A `UserError` for a choice of trained weights that the model does not have; loads no weights."""
    model = without_weights(architecture(config), config)
    for trainable in several:
        select_trainable(model, trainable)


def random_policy(config: Model, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """A model of ``config.architecture`` with random weights from ``config.seed``."""
    return random_weights(
        config,
        device,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_weights(config: Model, device: torch.device, **fields: Any) -> PreTrainedModel:
    """As `random_policy`, with what the tokenizer decides (``vocab_size``, ...) as fields of the config."""
    tell_numerics(config)
    shape = architecture(config, **fields)
    torch.manual_seed(config.seed)
    return _from_config(shape, config).eval().to(device)


def _from_config(shape: PreTrainedConfig, config: Model) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            shape,
            dtype=DTYPES[config.dtype],
            attn_implementation=resolved_attention(config),
            trust_remote_code=config.trust_remote_code,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"model {config.name}: {str(error).splitlines()[0]}") from None


def load_policy(path: str | Path, config: Model, *, own: bool, device: torch.device) -> PreTrainedModel:
    """The model at ``path`` in the configured dtype and attention, in evaluation mode.

    ``own`` says that this project wrote the folder; otherwise the config's revision and its word on
    remote code apply.  Weights are read from safetensors only.
    """
    from transformers import AutoModelForCausalLM

    tell_numerics(config)
    model = AutoModelForCausalLM.from_pretrained(
        str(path),
        revision=None if own else config.revision,
        trust_remote_code=False if own else config.trust_remote_code,
        dtype=DTYPES[config.dtype],
        attn_implementation=resolved_attention(config),
        use_safetensors=True,
    )
    return model.eval().to(device)


def select_trainable(
    model: torch.nn.Module, trainable: Literal["all"] | Sequence[str]
) -> list[torch.nn.Parameter]:
    """Freeze everything but the parameters of the modules whose names end with one of the suffixes.

    ``["mlp.down_proj"]`` is the paper's choice: one matrix of every block.  Returns the trained
    parameters in the model's order.
    """
    if trainable == "all":
        model.requires_grad_(True)
        return list(model.parameters())
    suffixes = {s for name, _ in model.named_modules() if name for s in _suffixes(name)}
    for pattern in trainable:
        if pattern not in suffixes:
            leaves = {name for name in suffixes if not any(part.isdigit() for part in name.split("."))}
            raise unknown("module in train.trainable", pattern, leaves)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if any(name == pattern or name.endswith("." + pattern) for pattern in trainable):
            module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
