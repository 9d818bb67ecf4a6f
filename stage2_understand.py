"""Stage 2, understand: supervised fine-tuning on spatial questions (SpatialLadder, arXiv 2510.08531, section 4, stage 2).

Seven types of questions about one picture, several views or a video, answered directly with a letter or a number.
Differences from the reference code:
1. the prompt carries no loss (theirs does);
2. video frames are sorted by time (the released rows sort them as strings);
3. all questions about the same pictures are branches of one prefix: about nine a video, which is encoded once;
4. localisation rows of stage 1 can be replayed (--replay): a small model forgets its boxes otherwise;
5. THE TOY MIXES IN WORKED ANSWERS: boxes, then the comparison, then the answer. From direct answers alone a model this small
   learns relations hardly better than a guess; from worked answers it does learn them. The paper's data has none, and
   --worked 0 leaves them out. Their prompt has other words (INSTRUCTIONS in common.py), so direct answers stay direct.

    python stage2_understand.py               # toy: about fifteen minutes on two cores
    python stage2_understand.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/stage2: metrics.jsonl, samples.jsonl, curves.png, checkpoint.pt, model/ (and adapter/).
"""

import math
import random
from dataclasses import dataclass

import common
from support import memory, runs
from support.runs import setting, word_list

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class UnderstandSettings(runs.TrainSettings):
    """Stage 2. A share of 0 uses none of the rows, 1 all, a value between them a random part."""

    direct: float = setting(1.0, "share of the spatial rows, answered directly; 0: none")
    worked: float = setting(0.0, "share of the toy's worked answers")
    types: list[str] = word_list("question types to learn, such as 'object size'; all: every type")
    replay: float = setting(0.0, "share of stage 1's localisation rows that stay in the mix")


PRESETS = {
    # 0.7 of stage 1's learning rate; the full rate was no worse after 320 steps.
    "toy": {
        "load": "fp32", "tune": "full", "keep_features": True, "optimizer": "muon", "lr": 7e-4, "muon_lr": 0.009,
        "steps": 900, "train_batch": 16, "branches": 9, "micro_batch": 4, "warmup": 0.05, "eval_every": 450, "save_every": 300,
        "direct": 0.25, "worked": 1.0, "replay": 0.5,
    },
    # The paper: one epoch, 16 rows a step, learning rate 1e-5 for full tuning. Here a step has 4 scenes with up to 9 questions.
    "3b": {
        "lr": 1e-4, "train_batch": 4, "branches": 9, "checkpointing": True, "eval_batch": 16,
        "min_picture_tokens": 16, "max_picture_tokens": 128,
    },
}  # fmt: skip
NEW_TOKENS = 224  # of the longest answer, a worked one

# ------------------------------------------------------------------------------------------------
# 2. The mix, and scores on held-out scenes
# ------------------------------------------------------------------------------------------------


def mix(scenes, settings):
    """Keep the shares of direct, worked and replayed rows that the settings ask for, in place. Returns `scenes`."""
    share = {"locate": settings.replay, "worked": settings.worked}
    rng = random.Random(settings.seed)
    for scene in scenes:
        scene.examples = [e for e in scene.examples if rng.random() < share.get(e.question_type, settings.direct)]
    return scenes


def evaluate(backbone, questions, boxes, settings, run):
    """Mean scores of greedy answers: {"direct", "work" (the toy), "iou" (with --replay)}. questions, boxes: lists of Scene."""
    scores = {}
    tasks = [("direct", questions)] + [("work", questions)] * (settings.worked > 0) + [("iou", boxes)]
    for name, scenes in tasks:
        if scenes:
            examples, texts = runs.generate_answers(
                backbone, scenes, name, NEW_TOKENS, eval_batch=settings.eval_batch, keep=settings.keep_features
            )
            scores[name] = float(common.score_answers(texts, examples)[0].mean())
            if name != "iou":
                run.log_samples(examples, texts)
    return scores


# ------------------------------------------------------------------------------------------------
# 3. The loop
# ------------------------------------------------------------------------------------------------


def train(backbone, packs, questions, boxes, settings, run):
    """Minimise the mean negative log-probability of the answers' tokens, as in stage 1. packs: from common.make_packs."""
    if not packs:
        raise SystemExit(f"{settings.data} has nothing to learn for this stage.")
    memory.check_memory(backbone, settings, memory.pack_lengths(backbone, packs), NEW_TOKENS)
    steps = settings.steps or math.ceil(len(packs) / settings.train_batch)
    optimizers = runs.make_optimizers(backbone.model, settings)
    for step in run.steps(steps, backbone, optimizers):
        # The batch is the same in all processes; each works on its share of the scenes.
        batch = common.batch_at(packs, step, settings.train_batch, settings.seed)
        tokens = sum(len(answer) for pack in batch for _, answer in pack.pairs)  # answer tokens of the whole batch
        backbone.model.train()
        loss = 0.0
        for part in runs.micro_batches(batch, settings.micro_batch):
            prefixes = common.encode_scenes(backbone, [pack.scene for pack in part], settings.keep_features)
            logps, _, _ = common.branch_logprobs(backbone, prefixes, [pack.pairs for pack in part])  # (N, C), 0 at padding
            part_loss = -logps.sum() / tokens  # summed over all parts: the mean over the batch's answer tokens
            part_loss.backward()
            loss += part_loss.item()
        runs.all_reduce_gradients(backbone.model.parameters())
        grad_norm = runs.optimizer_step(backbone.model, optimizers, settings, step, steps)
        row = {"loss": runs.all_reduce([loss])[0], "grad_norm": grad_norm, "tokens": tokens}
        scores = evaluate(backbone, questions, boxes, settings, run) if run.is_eval_step() else {}
        run.log(row, scores, [e for pack in batch for e in pack.scene.examples])


# ------------------------------------------------------------------------------------------------
# 4. Main
# ------------------------------------------------------------------------------------------------


def work(settings):
    """Load, train, save. Every process runs this."""
    if runs.is_finished(settings):
        return
    run = runs.Run(settings, {"loss": ["loss"], "held-out scores": ["direct", "work", "iou"], "gradient norm": ["grad_norm"]})
    sizes = settings.min_picture_tokens, settings.max_picture_tokens
    backbone = common.load_backbone(settings.model, settings.load, *sizes, runs.device())
    kinds = ["spatial"] + ["worked"] * (settings.worked > 0) + ["locate"] * (settings.replay > 0)
    scenes = mix(runs.training_scenes(settings, kinds, backbone), settings)
    questions = runs.held_out_scenes(settings, ["spatial"], backbone)
    boxes = runs.held_out_scenes(settings, ["locate"], backbone) if settings.replay else []
    packs = common.make_packs(backbone.tokenizer, scenes, settings.branches, settings.seed)
    common.adapt(backbone, settings)
    train(backbone, packs, questions, boxes, settings, run)
    run.finish(backbone)


def main():
    """Read the settings and start the processes."""
    runs.launch(work, runs.parse_settings(UnderstandSettings, PRESETS, "stage2", before="stage1"), graceful=True)


if __name__ == "__main__":
    main()
