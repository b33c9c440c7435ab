"""Sizes of a recipe's real models, counted on the model without weights that its configuration describes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ctpd.checkpoints import language_part
from ctpd.core.errors import UserError
from ctpd.models import add_lora
from ctpd.pipeline.model_checks import Skeletons
from ctpd.pipeline.references import External, Model
from ctpd.pipeline.stages.pretrain import PretrainStage
from ctpd.pipeline.stages.train import TrainStage
from ctpd.rehearsal.memory import Shape
from ctpd.rehearsal.operations import Multiplied
from ctpd.rehearsal.shrink import readable
from ctpd.testbed.config import PretrainConfig
from ctpd.train.config import LoraSpec


@dataclass(frozen=True, kw_only=True)
class CountedShape(Shape):
    """A model of any class: its widths, and numbers of weights that are counted, not computed from widths.

    Attributes:
        counted: weights of the part that is trained, tied ones once.
        largest_layer: weights of the largest layer.
        rest: weights of the other parts of a multimodal model.
        of_adapters: weights of the adapters of the training, where it has some.
    """

    counted: int
    largest_layer: int
    rest: int = 0
    of_adapters: int = 0

    @property
    def weights(self) -> int:
        """All weights of the trained part, as counted."""
        return self.counted

    @property
    def layer(self) -> int:
        """Weights of the largest layer, as counted."""
        return self.largest_layer

    def adapters(self, r: int) -> int:
        """Weights of the adapters, as counted."""
        return self.of_adapters


@dataclass(frozen=True, eq=False)
class RealModel:
    """A model of a recipe without its weights: what it holds, and what is multiplied with a token."""

    model: Any

    @cached_property
    def text(self) -> Any:
        """The configuration of the language part."""
        return readable(self.model.config.get_text_config())

    @cached_property
    def name(self) -> str:
        """The class."""
        return type(self.model).__name__

    def shape(self, lora: LoraSpec | None = None) -> CountedShape:
        """What the formulas of memory need; with the adapters of a training."""
        text, weights = self.text, self._numbers
        heads = int(getattr(text, "num_attention_heads", None) or 1)
        hidden = int(text.hidden_size)
        return CountedShape(
            vocabulary=int(text.vocab_size),
            hidden=hidden,
            intermediate=max(_numbers_of(text, "intermediate_size"), default=2 * hidden),
            layers=int(text.num_hidden_layers),
            heads=heads,
            kv_heads=max(_numbers_of(text, "num_key_value_heads"), default=heads),
            tied=self._is_tied,
            counted=weights["trained"],
            largest_layer=weights["layer"],
            rest=weights["rest"],
            of_adapters=0 if lora is None else self._adapters(lora),
        )

    def multiplied(self, lora: LoraSpec | None = None) -> Multiplied:
        """What is multiplied with every token of text."""
        text, numbers = self.text, self._numbers
        heads = max(_numbers_of(text, "num_attention_heads"), default=1)
        width = max(_numbers_of(text, "head_dim"), default=int(text.hidden_size) // heads)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
        attending = sum("linear" not in str(kind) and "mamba" not in str(kind) for kind in kinds)
        embeddings = 0 if self._is_tied else numbers["embeddings"]  # a tied one is read as the head
        idle = numbers["experts"] * (1 - self._chosen_experts)
        adapters = 0 if lora is None else self._adapters(lora)
        return Multiplied(numbers["trained"] - embeddings - idle, attending * heads * width, adapters)

    @cached_property
    def _is_tied(self) -> bool:
        head = self.model.get_output_embeddings()
        return head is None or bool(getattr(self.text, "tie_word_embeddings", False))

    @property
    def _chosen_experts(self) -> float:
        """The share of a layer's experts that a token is sent to."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        all_experts = max((n for name in names for n in _numbers_of(self.text, name)), default=0)
        chosen = max(
            (n for name in ("num_experts_per_tok", "top_k_experts") for n in _numbers_of(self.text, name)), default=0
        )
        return chosen / all_experts if chosen and all_experts else 1.0

    @cached_property
    def _numbers(self) -> dict[str, int]:
        model, parts = self.model, language_part(self.model)
        everything = {id(p): p.numel() for p in model.parameters()}
        if self._is_tied and model.get_output_embeddings() is not None:  # not yet one weight without a checkpoint
            everything.pop(id(model.get_output_embeddings().weight), None)
            everything[id(model.get_input_embeddings().weight)] = model.get_input_embeddings().weight.numel()
        inside = everything if parts is None else {id(p) for part in parts for p in part.parameters()}
        trained = sum(number for name, number in everything.items() if name in inside)
        decoder = model.get_decoder()
        layers: Any = next((m for m in decoder.children() if isinstance(m, torch.nn.ModuleList)), [])
        return {
            "trained": trained,
            "rest": sum(everything.values()) - trained,
            "layer": max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
            "embeddings": model.get_input_embeddings().weight.numel(),
            "experts": sum(p.numel() for name, p in decoder.named_parameters() if _is_of_an_expert(name)),
        }

    def _adapters(self, lora: LoraSpec) -> int:
        with torch.random.fork_rng(devices=[]):
            adapted: Any = add_lora(copy.deepcopy(self.model), r=lora.r, alpha=lora.alpha, targets=lora.targets, seed=0)
        return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _is_of_an_expert(name: str) -> bool:
    parts = name.split(".")
    return "experts" in parts and "shared_experts" not in parts


def _numbers_of(config: Any, name: str) -> list[int]:
    """The value of a field, or the values of a list of one for each layer."""
    found = getattr(config, name, None)
    values = found if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    return [value for value in values if isinstance(value, int)]


class RealModels:
    """The models of a recipe, each made once.

    Args:
        skeletons: the ready-made ones.
    """

    def __init__(self, skeletons: Skeletons) -> None:
        self._skeletons = skeletons
        self._known: dict[Any, RealModel | None] = {}

    def of(self, model: Model) -> RealModel | None:
        """The model that a stage reads or trains; None where its configuration cannot be had, or is refused."""
        source: Any = model.root
        while isinstance(source, TrainStage):
            source = source.start.root
        if isinstance(source, PretrainStage):
            return self.pretrained(source)
        if source not in self._known:
            self._known[source] = self._ready_made(source)
        return self._known[source]

    def pretrained(self, stage: PretrainStage) -> RealModel:
        """The model that the recipe makes itself."""
        if stage.key not in self._known:
            self._known[stage.key] = RealModel(_pretrained(stage.config))
        found = self._known[stage.key]
        assert found is not None
        return found

    def _ready_made(self, source: External) -> RealModel | None:
        try:
            skeleton = self._skeletons.of(source)
        except UserError:  # said where models are checked
            return None
        return None if skeleton is None else RealModel(skeleton.model)


def _pretrained(config: PretrainConfig) -> Any:
    """A model as `ctpd.testbed.models` makes it, without weights, with the largest vocabulary that its tokenizer may have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_position,
                tie_word_embeddings=True,
            )
        )
