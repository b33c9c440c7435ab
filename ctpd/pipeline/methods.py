"""The one table of method names. A method is an objective class, named by a string and imported on use."""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from ctpd.core.config import Config, nearest, validate
from ctpd.core.errors import UserError
from ctpd.objectives.base import Objective

METHODS: Mapping[str, str] = {
    "sft": "baselines.sft:SFT",
    "dpo": "baselines.dpo:DPO",
    "tis_dpo": "baselines.tis_dpo:TISDPO",
    "ctpd": "ctpd.objectives.preference:Preference",
    "sequence_kd": "baselines.sequence_kd:SequenceKD",
    "token_kd": "baselines.token_kd:TokenKD",
    "dckd": "baselines.dckd:DCKD",
    "adpa": "baselines.adpa:ADPA",
    "multi_level_ot": "baselines.multi_level_ot:MultiLevelOT",
    "alm": "baselines.alm:ALM",
    "gold": "baselines.gold:GOLD",
    "x_token": "baselines.x_token:XToken",
    "dskd": "baselines.dskd:DSKD",
    "dskd_cma": "baselines.dskd_cma:DSKDCMA",
    "mined": "baselines.mined:MinED",
    "uld": "baselines.uld:ULD",
}


def make_objective(method: str, params: Mapping[str, Any], *, source: str) -> Objective:
    """The objective of a method with these parameters.

    Args:
        method: a name of the table.
        params: the recipe's values; the objective's defaults fill the rest.
        source: the recipe and run, for errors.

    Raises:
        UserError: unknown method or parameter, or values that contradict each other.
    """
    if method not in METHODS:
        raise UserError(
            f"there is no method '{method}'.{nearest(method, METHODS)}",
            where=source,
            fix=f"Use one of: {', '.join(METHODS)}",
        )
    module, _, name = METHODS[method].partition(":")
    cls = getattr(importlib.import_module(module), name)
    try:
        objective: Objective = cls(_validated(cls.params_type, params, source=source))
    except UserError as error:
        if error.where is not None:
            raise
        raise UserError(error.what, where=source, fix=error.fix) from error
    return objective


def _validated(params_type: type[Any], params: Mapping[str, Any], *, source: str) -> Any:
    if issubclass(params_type, Config):
        return validate(params_type, params, source=source)
    # TODO(integrator): remove with the last parameters that are a dataclass (preference, dpo, tis_dpo).
    hints = typing.get_type_hints(params_type)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclasses.fields(params_type)
    }
    model = pydantic.create_model(params_type.__name__, __base__=Config, **fields)
    return params_type(**dict(validate(model, params, source=source)))
