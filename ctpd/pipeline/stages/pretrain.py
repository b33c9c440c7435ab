"""A testbed model, pretrained from scratch on whole texts with the same trainer as every other training."""

from dataclasses import dataclass
from typing import Any

from ctpd.pipeline.references import MODEL_FOLDER, read_tokenizer
from ctpd.pipeline.stage import Stage, Work
from ctpd.pipeline.stages.tokenizer import TokenizerStage
from ctpd.pipeline.stages.world import WorldStage
from ctpd.testbed.config import PretrainConfig
from ctpd.train.config import Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class PretrainStage(Stage):
    """A small Llama model."""

    kind = "pretrain"
    version = 2
    collective = True

    config: PretrainConfig
    world: WorldStage
    tokenizer: TokenizerStage

    def build(self, work: Work) -> None:
        """Initialize the weights and train on the corpus."""
        from ctpd.models import install_scorer
        from ctpd.pipeline.methods import Method
        from ctpd.pipeline.training import finish_training, fit_settings, resume_folder, save_trained
        from ctpd.saving import save_tokenizer
        from ctpd.testbed.models import new_model
        from ctpd.train.fit import Optimization, fit
        from ctpd.train.trainer import Training, UnitPass

        config = self.config
        tokenizer: Any = read_tokenizer(self.tokenizer, work)
        untrained: Any = new_model(tokenizer, config)
        model = install_scorer(untrained.to(work.runtime.torch_device()))
        objective = Method.make("sft", {}, source="pretrain").objective()
        training = Training(
            model=model,
            objective=objective,
            rows=self._rows(work, tokenizer),
            forward_pass=UnitPass(objective),
        )
        optimization = Optimization(
            schedule=Schedule(
                pairs_per_step=config.texts_per_step, schedule="cosine", warmup_ratio=config.warmup_ratio
            ),
            learning_rate=config.learning_rate,
            seed=config.seed,
            precision="float32",
            max_steps=config.steps,
        )
        done = fit(training, optimization, folder=resume_folder(work), settings=fit_settings(work))
        save_trained(work, model)
        if work.writes:
            save_tokenizer(tokenizer, work.folder / MODEL_FOLDER)
            finish_training(work, done)

    def _rows(self, work: Work, tokenizer: Any) -> Any:
        from ctpd.pipeline.rows import text_rows

        texts = self.world.texts(work, self.config.corpus)
        encoded = tokenizer(texts, truncation=True, max_length=self.config.max_position - 1)["input_ids"]
        return text_rows([[*ids, tokenizer.eos_token_id] for ids in encoded])
