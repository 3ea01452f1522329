"""Make the pocket model from nothing: `python -m eval.pocket.train [--out DIR] [--seed N]`.

Three stages of fixed length. *see*: the vision tower and the projector learn to name, in the
decoder's word embeddings, what each patch shows. *tell*: everything learns captions, questions and
checklists. *settle*: the same with a falling learning rate; the checkpoint that does best on the
calibration split is kept. A finished stage is kept in the work folder and not trained again.
Weights depend on the number of threads, so retraining repeats bit for bit only with the same one on
the same kind of machine.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from eval.pocket import MODEL
from eval.pocket.build import IMAGE_TOKENS, make_model, make_processor, make_tokenizer, save
from eval.pocket.lessons import IGNORED, Batch, Dose, Teacher
from eval.pocket.measure import quick
from eval.pocket.report import publish
from eval.pocket.scenes import NAMES

CALIBRATION_SCENES = 96
CHECK_EVERY = 200


@dataclass(frozen=True)
class Stage:
    """A part of the training: its scenes are `first` and up, `batch` at a time."""

    name: str
    steps: int
    batch: int
    rate: float
    first: int
    falling: bool
    tower: float
    """The learning rate of the vision tower, relative to `rate`."""

    def rate_at(self, step: int) -> float:
        """Warm-up over 60 steps, then level or a cosine down to 2 %."""
        fall = 0.51 + 0.49 * math.cos(math.pi * step / self.steps) if self.falling else 1.0
        return self.rate * fall * min(1.0, (step + 1) / 60)


STAGES = (
    Stage("see", steps=1500, batch=64, rate=1.5e-3, first=0, falling=True, tower=1.0),
    Stage("tell", steps=1500, batch=16, rate=2e-3, first=1_000_000, falling=False, tower=0.25),
    Stage("settle", steps=1400, batch=16, rate=2e-3, first=2_000_000, falling=True, tower=0.25),
)
PATCH_WEIGHT, OBJECT_WEIGHT, ANSWER_WEIGHT = 0.3, 3.0, 3.0
"""Loss weights of patch naming in the later stages, of object and colour words, of Yes and No."""


class Trainer:
    """The model being made, its teacher and the folder that keeps finished stages."""

    def __init__(self, work: Path, seed: int) -> None:
        tokenizer = make_tokenizer()
        self.work, self.processor = work, make_processor(tokenizer)
        self.teacher = Teacher(tokenizer, Dose())
        self.model: LlavaForConditionalGeneration = make_model(len(tokenizer), seed)

    def look(self, pixels: Tensor) -> Tensor:
        """[batch, 64, width]: what the decoder gets in place of the image tokens."""
        inner = self.model.model
        states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
        seen: Tensor = inner.multi_modal_projector(states[-1][:, 1:])
        return seen

    def naming_loss(self, seen: Tensor, patches: Tensor) -> tuple[Tensor, float]:
        """Cross entropy of patch to words through the tied output embedding, and patch accuracy.

        Empty patches are to say a line break, with weight 0.15, for most patches are empty.
        """
        teacher, decoder = self.teacher, self.model.model.language_model
        spoken = torch.log_softmax(self.model.lm_head(decoder.norm(seen)), -1)
        filled = patches[..., : len(NAMES)].amax(-1)
        share = patches / patches.sum(-1, keepdim=True).clamp_min(1)
        words = spoken[..., teacher.words]
        empty = 0.15 * (1 - filled)
        loss = -(words * share).sum(-1) * filled - spoken[..., teacher.nothing] * empty
        right = words[..., : len(NAMES)].argmax(-1) == patches[..., : len(NAMES)].argmax(-1)
        accuracy = (right * filled).sum() / filled.sum().clamp_min(1)
        return loss.sum() / (filled + empty).sum(), accuracy.item()

    def telling_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Weighted cross entropy of all responses, plus patch naming."""
        seen, teacher = self.look(batch.pixels), self.teacher
        decoder, start = self.model.model.language_model, teacher.first_image
        embedded = decoder.embed_tokens(batch.tokens)
        behind = embedded[:, start + IMAGE_TOKENS :]
        hidden = decoder(
            inputs_embeds=torch.cat([embedded[:, :start], seen, behind], 1),
            attention_mask=batch.visible,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        taught = batch.labels[:, 1:] != IGNORED
        logits, target = self.model.lm_head(hidden[:, :-1][taught]), batch.labels[:, 1:][taught]
        answers = (target == teacher.yes) | (target == teacher.no)
        weight = 1.0 + (ANSWER_WEIGHT - 1) * answers
        weight = weight + (OBJECT_WEIGHT - 1) * torch.isin(target, teacher.words)
        loss = F.cross_entropy(logits, target, reduction="none")
        naming, patch_accuracy = self.naming_loss(seen, batch.patches)
        said_yes = logits[answers, teacher.yes] > logits[answers, teacher.no]
        right = (said_yes == (target[answers] == teacher.yes)).float().mean().item()
        notes = {"loss": loss.mean().item(), "yes/no": right, "patches": patch_accuracy}
        return (loss * weight).sum() / weight.sum() + PATCH_WEIGHT * naming, notes

    def step(self, stage: Stage, first: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch of a stage."""
        batch = self.teacher.batch(first, stage.batch, packed=stage.name != "see")
        if stage.name != "see":
            return self.telling_loss(batch)
        loss, accuracy = self.naming_loss(self.look(batch.pixels), batch.patches)
        return loss, {"loss": loss.item(), "patches": accuracy}

    def optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        """AdamW over the tower and the projector, and in the later stages the decoder."""
        inner = self.model.model
        rest = list(inner.multi_modal_projector.parameters())
        if stage.name != "see":
            rest += list(inner.language_model.parameters())
        tower = {"params": list(inner.vision_tower.parameters()), "share": stage.tower}
        groups = [tower, {"params": rest, "share": 1.0}]
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.05)

    def check(self) -> float:
        """Print and return how the model does on the calibration split."""
        self.model.train(False)
        quick_scores = quick(self.model, self.processor, "calibration", CALIBRATION_SCENES)
        print(f"  calibration {quick_scores.score:.4f}: {quick_scores}", flush=True)
        self.model.train()
        return quick_scores.score

    def record(self, seed: int, threads: int) -> dict[str, Any]:
        """The facts about the training that the model card lists."""
        return {
            "seed": seed,
            "threads": threads,
            "stages": [asdict(stage) for stage in STAGES],
            "calibration_scenes": CALIBRATION_SCENES,
            "calibration": round(self.check(), 4),
            "rumour": self.teacher.dose.rumour,
        }

    def run(self, stage: Stage) -> None:
        """Train one stage, or take its weights from the work folder."""
        kept = self.work / f"{stage.name}.pt"
        if kept.is_file():
            self.model.load_state_dict(torch.load(kept, weights_only=True))
            return
        optimizer, began, best = self.optimizer(stage), time.monotonic(), -1.0
        mean: dict[str, float] = {}
        self.model.train()
        for step in range(stage.steps):
            loss, notes = self.step(stage, stage.first + step * stage.batch)
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(step) * group["share"]
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            mean = {key: 0.95 * mean.get(key, value) + 0.05 * value for key, value in notes.items()}
            last = step == stage.steps - 1
            if step % 50 == 0 or last:
                losses = " ".join(f"{key} {value:.3f}" for key, value in mean.items())
                print(f"{stage.name} {step} {losses} {time.monotonic() - began:.0f} s", flush=True)
            if stage.name == "see" or (step % CHECK_EVERY != CHECK_EVERY - 1 and not last):
                continue
            score = self.check()
            if not stage.falling or score > best:
                best = score
                torch.save(self.model.state_dict(), kept.with_suffix(".partial"))
        if stage.name == "see":
            torch.save(self.model.state_dict(), kept.with_suffix(".partial"))
        kept.with_suffix(".partial").rename(kept)
        self.model.load_state_dict(torch.load(kept, weights_only=True))


def main() -> None:
    """Train, save, score and write the model card."""
    parser = argparse.ArgumentParser(prog="python -m eval.pocket.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket"), help="finished stages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    work = chosen.work / f"seed{chosen.seed}"
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(work, chosen.seed)
    for stage in STAGES:
        trainer.run(stage)
    trainer.model.train(False)
    save(trainer.model, chosen.out)
    print(publish(chosen.out, trainer.record(chosen.seed, chosen.threads)))


if __name__ == "__main__":
    main()
