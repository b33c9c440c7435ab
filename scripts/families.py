"""What the families of models that people have do here: `python scripts/families.py`, which writes results/families/README.md.

Each table is made by one function of `TABLES`; `--tables` chooses some, and keeps the others as they are written. The models
are random and tiny, of the classes of transformers; the tokenizers are the published ones of the folder `shared` beside
the project.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctpd.checkpoints import language_part, model_class
from ctpd.core.errors import UserError
from ctpd.models import Score, add_lora, install_scorer, load_tokenizer, score
from ctpd.pipeline.stages.pairs import read_usable_file
from ctpd.probes import configure_scorer, largest_difference
from ctpd.text.config import PairsConfig
from ctpd.text.pairs import Dropped, Message, Pair, ReadPairs
from ctpd.text.prepare import PreparedPairs, prepare_pairs
from ctpd.text.render import ChatTemplate, TemplatedTokenizer
from ctpd.text.templates import DIFFERENCES

RESULTS = Path(__file__).resolve().parent.parent / "results" / "families" / "README.md"

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_WIDE = {**_SIZES, "head_dim": 8}
_WINDOWS = {**_WIDE, "sliding_window": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 16}
_STATES = {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
_QWEN_IDS = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}


class Family(NamedTuple):
    """A class of models: the name of its configuration in transformers, and the sizes of a tiny one."""

    config: str
    sizes: Mapping[str, Any]

    def model(self) -> PreTrainedModel:
        """A random model in evaluation mode, loaded as a checkpoint of it would be; the language part alone trains."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        model: PreTrainedModel = model_class(config).from_config(config).eval()
        if (parts := language_part(model)) is not None:
            model.requires_grad_(False)
            for part in parts:
                part.requires_grad_(True)
        return install_scorer(model)


FAMILIES: dict[str, Family] = {
    "Llama": Family("LlamaConfig", _SIZES),
    "Llama 4, text": Family("Llama4TextConfig", {**_WIDE, "intermediate_size_mlp": 32, "num_local_experts": 2}),
    "Qwen 2": Family("Qwen2Config", _SIZES),
    "Qwen 3": Family("Qwen3Config", _WIDE),
    "Gemma 2": Family("Gemma2Config", {**_WINDOWS, "final_logit_softcapping": 2.0}),
    "Gemma 3, text": Family("Gemma3TextConfig", _WINDOWS),
    "Gemma 3, multimodal": Family(
        "Gemma3Config",
        {
            "text_config": _WINDOWS,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
            "boi_token_index": 62,
            "eoi_token_index": 61,
        },
    ),
    "Gemma 3n, text": Family(
        "Gemma3nTextConfig",
        {
            **_WINDOWS,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 4,
            "num_kv_shared_layers": 1,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
        },
    ),
    "Gemma 4, text": Family(
        "Gemma4TextConfig",
        {
            **_WINDOWS,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 4,
        },
    ),
    "Mistral": Family("MistralConfig", _SIZES),
    "Mistral 3, multimodal": Family(
        "Mistral3Config",
        {
            "text_config": {**_SIZES, "model_type": "mistral"},
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 63,
        },
    ),
    "Phi-3": Family("Phi3Config", _SIZES),
    "OLMo 2": Family("Olmo2Config", _SIZES),
    "GLM-4": Family("Glm4Config", _WIDE),
    "Granite": Family("GraniteConfig", {**_SIZES, "logits_scaling": 4.0}),
    "Cohere 2": Family("Cohere2Config", {**_SIZES, "sliding_window": 4}),
    "GPT-2": Family(
        "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ),
    "Mixtral (mixture of experts)": Family("MixtralConfig", {**_SIZES, "num_local_experts": 4}),
    "Qwen 2 MoE (mixture of experts)": Family("Qwen2MoeConfig", {**_SIZES, **_SHARED_EXPERT}),
    "Qwen 3 MoE (mixture of experts)": Family("Qwen3MoeConfig", {**_WIDE, **_EXPERTS}),
    "Qwen 2.5 VL, multimodal": Family(
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_SIZES, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0]},
            **_QWEN_IDS,
        },
    ),
    "Qwen 3.5, multimodal (hybrid)": Family(
        "Qwen3_5Config",
        {
            "text_config": {**_WIDE, **_LINEAR_ATTENTION},
            "vision_config": {**_QWEN_VISION, "patch_size": 8, "num_position_embeddings": 16},
            **_QWEN_IDS,
        },
    ),
    "Qwen 3 Next (hybrid)": Family("Qwen3NextConfig", {**_WIDE, **_SHARED_EXPERT, **_LINEAR_ATTENTION}),
    "Bamba (hybrid)": Family("BambaConfig", {**_SIZES, **_STATES, "attn_layer_indices": [1]}),
    "Falcon H1 (hybrid)": Family("FalconH1Config", {**_SIZES, **_STATES, "mamba_d_ssm": 32, "lm_head_multiplier": 0.5}),
    "Mamba": Family(
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.3,
        },
    ),
}


class Agreement(NamedTuple):
    """How the scorer without logits compares with full logits.

    Attributes:
        logps: largest difference of log-probabilities, in nats.
        gradients: largest difference of gradients of trained weights, relative to the largest entry of any.
        full: whether the program uses full logits for this model, since its trial of the other way fails.
    """

    logps: float
    gradients: float
    full: bool


def compare(model: nn.Module) -> Agreement:
    """The scorer, as the program sets it up for the model, beside the model's own logits, on made-up rows.

    Raises:
        UserError: the model cannot be scored.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (3, 10), generator=generator)
    predictors = torch.tensor([1, 2, 7, 12, 13, 20, 28])
    request = Score(predictors, ids.flatten()[predictors + 1])
    weights = torch.linspace(-1, 2, len(predictors))
    trained = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scorer without logits does not reproduce")  # said in the table
        configure_scorer(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def gradients(logps_N: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logps_N * weights).sum(), trained, materialize_grads=True)

    fused_N = score(model, ids, request)
    logits_NV = model(input_ids=ids).logits.flatten(0, 1)[predictors].float()
    full_N = logits_NV.log_softmax(-1).gather(-1, request.targets[:, None])[:, 0]
    expected, found = gradients(full_N), gradients(fused_N)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    worst = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    return Agreement(largest_difference(full_N.detach(), fused_N.detach()), worst / largest, base._scorer_uses_logits)


def with_adapters(model: PreTrainedModel) -> nn.Module:
    """The model with random adapters on all of its linear layers.

    Raises:
        UserError: PEFT puts none on one of them.
    """
    adapted = add_lora(model, r=2, alpha=4, targets="all-linear", seed=0).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def classes_table() -> Iterator[str]:
    """A row for each class of models: whether the scorer's values and gradients are those of full logits."""
    yield "## Classes of models"
    yield ""
    yield (
        "Tiny random models of each class. Log-probabilities of `ctpd.models.score` beside the model's own logits: largest "
        "difference in nats, and of the gradients of all trained weights relative to their largest entry. LoRA: `all-linear`."
    )
    yield ""
    yield "| family | class | values, full | gradients, full | values, LoRA | gradients, LoRA | |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for name, family in FAMILIES.items():
        model, cells, said = family.model(), list[str](), list[str]()
        if language_part(model) is not None:
            said.append("the language part is trained")
        for prepare in (lambda model: model, with_adapters):
            try:
                found = compare(prepare(model))
            except UserError as error:
                cells += ["refused", "refused"]
                said.append(f"LoRA: {error.what}" if cells[2:] else error.what)
                continue
            cells += [f"{found.logps:.0e}", f"{found.gradients:.0e}"]
            if found.full:
                said.append("full logits are used")
        yield f"| {name} | `{type(model).__name__}` | {' | '.join(cells)} | {'; '.join(dict.fromkeys(said))} |"


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
_DATA = SHARED / "preference" / "ultrafeedback_binarized_eval200.parquet"
_PAIRS, _CHANGED = 200, 30  # the whole sample
# Of tokenizers whose package has no chat template: that of the family, with a turn of the model and without a system role.
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def sample() -> ReadPairs:
    """Pairs of the sample, and after them some of the same with what templates treat differently."""
    rows = list(read_usable_file(_DATA).rows)
    pairs = [row for row in rows if isinstance(row, Pair) and row.chosen and row.rejected][:_PAIRS]
    first, second, third = (pairs[i : i + _CHANGED] for i in range(0, 3 * _CHANGED, _CHANGED))
    number = len(rows)
    changed = [
        *(replace(pair, prompt=(Message("system", "Answer briefly."), *pair.prompt)) for pair in first),
        *(replace(pair, chosen=f"<think>\nA question.\n</think>\n\n{pair.chosen}") for pair in second),
        *(replace(pair, prompt=(*pair.prompt, Message("user", "Please answer."))) for pair in third),
    ]
    added = [replace(pair, id=str(number + i), chosen_marks=()) for i, pair in enumerate(changed)]
    return ReadPairs([*pairs, *added, *(row for row in rows if isinstance(row, Dropped))], _DATA.name)


def templated(name: str, role: str) -> TemplatedTokenizer:
    """A published tokenizer with its own chat template."""
    tokenizer: Any = load_tokenizer(SHARED / "tokenizers" / name)
    tokenizer.name_or_path = name
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _GEMMA
    return TemplatedTokenizer(tokenizer, ChatTemplate(tokenizer, {}), name=role)


def lost_tokens(prepared: PreparedPairs) -> int:
    """Tokens of responses and ends in no span, and spans without a token of one of the models: there should be none."""
    lost = 0
    for rows in (prepared.teacher, prepared.student):
        for row, spans in enumerate(prepared.num_spans.tolist()):
            unit = rows.unit[rows.row_starts[row] : rows.row_starts[row + 1]]
            scored = unit[unit >= 0]
            lost += spans - len(np.unique(scored)) + int(np.count_nonzero(np.diff(scored) < 0))
    return lost


def tokenizers_table() -> Iterator[str]:
    """A row for each pair of published tokenizers: what of the sample is used, and how it is aligned."""
    names = sorted(path.name for path in (SHARED / "tokenizers").iterdir() if path.is_dir())
    given = sample()
    yield "## Tokenizers and templates"
    yield ""
    yield (
        f"Each published tokenizer as teacher and as student, with its own chat template, on {len(list(given.pairs))} pairs: the "
        f"first {_PAIRS} of `{_DATA.name}`, and of them again {_CHANGED} with a system message, {_CHANGED} with reasoning "
        f"in the chosen response, and {_CHANGED} with two messages of the user in a row. Gemma 2's package has no template; "
        "that of the family is used, without a system role. At most 512 tokens; pairs with prompts above 256 are dropped. "
        "The template "
        "differs: rows that it renders otherwise itself, by kind (docs/method.md#templates). Lost: tokens without a span "
        "and spans without a token."
    )
    yield ""
    yield "| teacher | student | rows | dropped | teacher's template differs | student's template differs | 1:1 | 1:n | n:1 | n:m | lost |"
    yield "| --- | --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    config = PairsConfig(max_tokens=512, max_prompt_tokens=256, max_dropped=0.9)
    for teacher, student in product(names, names):
        sides = templated(teacher, "teacher"), templated(student, "student")
        found = prepare_pairs({"train": given}, config, teacher=sides[0], student=sides[1])
        dropped = ", ".join(f"{number} {reason}" for reason, number in found.dropped.items() if number) or "none"
        differs = [
            ", ".join(
                f"{number} {kind}"
                for kind in DIFFERENCES
                if (number := int(found.report.get(f"{role}_template_{kind}", 0)))
            )
            or "no"
            for role in ("teacher", "student")
        ]
        spans = found.report["spans"]
        shares = [f"{100 * found.report[f'spans_{kind}'] / spans:.1f} %" for kind in ("1_1", "1_n", "n_1", "n_m")]
        cells = [teacher, student, str(2 * len(found.pair_ids)), dropped, *differs, *shares, str(lost_tokens(found))]
        yield f"| {' | '.join(cells)} |"


TABLES: tuple[Callable[[], Iterator[str]], ...] = (classes_table, tokenizers_table)


def main() -> None:
    """Write all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--tables", nargs="+", choices=[table.__name__ for table in TABLES])
    given = parser.parse_args()
    to: Path = given.to
    kept = sections(to) if given.tables else {}
    lines = ["# Families of models", "", "Written by `python scripts/families.py`."]
    for number, table in enumerate(TABLES):
        old = kept.get(number)
        wanted = given.tables is None or table.__name__ in given.tables or old is None
        lines += ["", *(table() if wanted else old or ())]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sections(path: Path) -> dict[int, list[str]]:
    """The lines of each table that a file has, by its number."""
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {number: f"## {part}".rstrip("\n").split("\n") for number, part in enumerate(parts)}


if __name__ == "__main__":
    main()
