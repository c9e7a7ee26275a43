"""From a composed Hydra config to a checked `Config`, or to one line that says what is wrong."""

from __future__ import annotations

from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bfpo_exp.config.data import Data
from bfpo_exp.config.schema import Config, Loss
from bfpo_exp.config.together import check_together
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.losses import StagedLoss, get_loss, is_staged

M = TypeVar("M", bound=BaseModel)


def checked(composed: DictConfig) -> Config:
    """The typed config; raises `UserError` for the first value out of type or range."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]} has no value; set {missing[0]}=...")
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, OmegaConfBaseException) as error:
        raise UserError(str(error).split("full_key")[0]) from None
    config = validated(Config, plain, prefix="")
    loss = _checked_loss(config.loss, config.data, prefix="loss.")
    # What a soup is made of was trained elsewhere: the loss of this config has no part in it.
    method = config.method or ("soup" if "soup" in config.stages else None)
    config = config.model_copy(update={"loss": loss, "method": method})
    check_together(config)
    return config


def _checked_loss(loss: Loss, data: Data, prefix: str) -> Loss:
    """The loss with its hyper-parameters checked against its function's signature, or its schema."""
    spec = get_loss(loss.name)
    values = validated(spec.hyperparameters, loss.hyperparameters, prefix).model_dump()
    if missing := [stream for stream in loss.streams or () if stream not in data.streams]:
        raise UserError(
            f"{prefix}streams={loss.streams}, but the data mix has no stream {missing[0]!r} "
            f"(data.streams={data.streams})"
        )
    if loss.streams == []:
        raise UserError(
            f"{prefix}streams=[] leaves nothing to train on; allowed: null (all), helpfulness, safety"
        )
    if isinstance(spec, StagedLoss):
        _check_no_pairs(loss, prefix)
        return loss.model_copy(update=values)
    orders = spec.orders or ("helpfulness", "safety", "stream")
    if loss.order not in orders:
        raise UserError(
            f"{prefix}order={loss.order or 'null'} is not allowed: loss {loss.name} is defined on pairs "
            f"ordered by {' or '.join(orders)}"
        )
    if loss.reference_free and spec.step_means:
        raise UserError(f"{prefix}reference_free=true, but loss {loss.name} has no form without a reference")
    first = None if loss.first is None else _checked_loss(loss.first, data, prefix + "first.")
    if spec.needs_margin and (first is None or "beta" not in first.hyperparameters):
        given = "null" if first is None else first.name
        raise UserError(
            f"{prefix}first={given}, but loss {loss.name} needs the rewards beta log(pi / ref) of a policy "
            "that is trained first; set it to a loss with a beta, such as dpo"
        )
    if first is not None and is_staged(first):
        raise UserError(
            f"{prefix}first={first.name}, but a stage before is trained on pairs; set it to dpo, say"
        )
    return loss.model_copy(update={**values, "first": first})


def _check_no_pairs(loss: Loss, prefix: str) -> None:
    """A loss that compares no pairs leaves what is said of them at its config's values."""
    fixed = {"order": None, "logps": "sum", "reference_free": False, "first": None}
    for name, value in fixed.items():
        if (given := getattr(loss, name)) != value:
            shown = given.name if isinstance(given, Loss) else given
            raise UserError(
                f"{prefix}{name}={shown} means nothing to loss {loss.name}, which compares no pairs"
            )


def validated(model: type[M], values: Any, prefix: str) -> M:
    """The typed values; raises `UserError` for the first that is wrong, whose key begins with ``prefix``."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explained(model, error, prefix) from None


def _explained(model: type[BaseModel], error: ValidationError, prefix: str) -> UserError:
    """One line for the first problem: the key, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "literal["))]
    path, _ = _followed(model, parts)
    key = (prefix + ".".join(path)).rstrip(".")
    if first["type"] == "extra_forbidden":
        _, parent = _followed(model, parts[:-1])
        return unknown(
            f"key in {(prefix + '.'.join(path[:-1])).rstrip('.') or 'the config'}",
            path[-1],
            (list(parent.model_fields) if _is_node(parent) else [])
            + ([*Loss.model_fields] if prefix.startswith("loss.") else []),
        )
    if first["type"] == "union_tag_invalid":
        kind = first["ctx"]["discriminator"].strip("'")
        return unknown(f"{key}.{kind}", first["ctx"]["tag"], _kinds(model.model_fields[path[-1]]))
    if first["type"] == "missing":
        return UserError(f"{key} has no value; set {key}=...")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return UserError(f"{key}: {message}" if key else message)
    if first["type"] == "literal_error":
        return UserError(f"{key}={first['input']!r} is not allowed; allowed: {first['ctx']['expected']}")
    return UserError(f"{key}={first['input']!r} is not allowed: {message[0].lower()}{message[1:]}")


def _followed(model: type[BaseModel], parts: list[str]) -> tuple[list[str], Any]:
    """The keys that a path goes along, and the node that it leads to.

    After the key of a node of several kinds (such as ``combine``) pydantic's path names the kind, which is
    no key.
    """
    keys: list[str] = []
    node: Any = model
    kinds: dict[str, type[BaseModel]] = {}
    for part in parts:
        if part in kinds:
            node, kinds = kinds[part], {}
            continue
        keys.append(part)
        if _is_node(node) and part in node.model_fields:
            kinds = _kinds(node.model_fields[part])
            node = node.model_fields[part].annotation
        else:  # a mapping of named nodes, such as data.pairs.<name>, has no fields but a type of values
            kinds, node = {}, (get_args(node) or [None])[-1]
        if get_origin(node) in (Union, UnionType):  # a node or null
            node = next((form for form in get_args(node) if _is_node(form)), node)
    return keys, node


def _kinds(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The nodes that a field may hold, by the value of the key that tells them apart."""
    name = field.discriminator
    if not isinstance(name, str):
        return {}
    return {get_args(form.model_fields[name].annotation)[0]: form for form in get_args(field.annotation)}


def _is_node(form: Any) -> bool:
    return isinstance(form, type) and issubclass(form, BaseModel)
