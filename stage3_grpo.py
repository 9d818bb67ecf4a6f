"""Stage 3, reason: a short cold start on thinking traces, then GRPO (SpatialLadder, arXiv 2510.08531, section 4, stage 3;
GRPO: DeepSeekMath, arXiv 2402.03300, equations 3 and 4).

For each question the policy samples a group of G completions. A completion is rewarded for its format (one <think> block,
then one <answer> block) and for the accuracy of its answer. Its advantage is its reward compared with the group's mean, and
the policy moves toward the completions with positive advantage. Differences from the reference code:
1. the KL reference is the policy with its adapter switched off: every stage merges its adapter, so this IS the starting
   policy, and it costs no memory;
2. a group whose rewards are all equal teaches nothing: its backward pass is skipped, and it is counted (dead_groups);
3. format is rewarded only with a legal answer (a letter among the options, a number). Rewarded alone, it locked in completions
   that had the format and answered nothing (--legal_format false is the paper);
4. localisation questions can be mixed in, rewarded by IoU, so that a small model keeps its boxes;
5. the cold start can stop when a MEASURED share of sampled completions is well formed (--cold_format). The toy does not use
   it: stopped at a share of .5, the thoughts were still worse than the worked answers of stage 2 (skill .37, not .50).

    python stage3_grpo.py                     # toy: about ten minutes on two cores
    python stage3_grpo.py --preset 3b --data data/SpatialLadder-26k

Writes runs/<preset>/coldstart and runs/<preset>/stage3, each with metrics.jsonl, samples.jsonl, curves.png, checkpoint.pt,
model/ (and adapter/).
"""

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import common
from support import memory, runs
from support.runs import setting, word_list

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------

LOSS_AVERAGES = ("sequence", "token", "constant")


@dataclass
class GRPOSettings(runs.TrainSettings):
    """Stage 3. lr, steps and the like are GRPO's; the cold start has its own, which start with cold_."""

    cold_start: bool = setting(True, "train on thinking traces first; false: GRPO starts from --model")
    cold_lr: float = setting(1e-4, "cold start: peak learning rate of AdamW")
    cold_muon_lr: float = setting(0.009, "cold start: peak learning rate of Muon")
    cold_tune: str = setting("lora", "cold start: lora or full", ("lora", "full"))
    cold_optimizer: str = setting("adamw", "cold start: adamw or muon", tuple(runs.OPTIMIZERS))
    cold_steps: int = setting(0, "cold start: optimiser steps; 0: one pass over the traces")
    cold_train_batch: int = setting(16, "cold start: scenes in an optimiser step")
    cold_mix: float = setting(0.0, "cold start: rows of the stages before that are mixed in, for each trace")
    cold_format: float = setting(1.1, "cold start: stop when this share of sampled completions is well formed and legal")
    cold_eval_every: int = setting(100, "cold start: steps between measurements of that share")
    types: list[str] = word_list("question types that GRPO asks, such as 'object size'; all: every type")
    group_size: int = setting(8, "G: completions sampled for a question")
    max_new_tokens: int = setting(1024, "longest completion")
    temperature: float = setting(1.0, "of the policy, when it samples and when it is scored")
    epsilon_low: float = setting(0.2, "the ratio is clipped at 1 - epsilon_low ...")
    epsilon_high: float = setting(0.2, "... and at 1 + epsilon_high")
    beta: float = setting(0.01, "weight of the KL to the starting policy; 0: none")
    loss_average: str = setting("sequence", "average the loss over: sequence (each completion, then all: the paper), token (all "
                                "tokens: DAPO) or constant (max_new_tokens: Dr. GRPO)", LOSS_AVERAGES)  # fmt: skip
    scale_rewards: bool = setting(True, "divide advantages by the group's standard deviation; false: Dr. GRPO")
    mu: int = setting(1, "updates with the same rollout")
    mask_overlong: bool = setting(False, "leave completions that were cut at max_new_tokens out of the loss")
    legal_format: bool = setting(True, "reward the format only with a legal answer; false: the paper")
    locate: float = setting(0.0, "share of localisation questions, rewarded by IoU")
    locate_reward: float = setting(0.0, "weight of a third reward: the mean IoU of the boxes in the thought with those of the "
                                        "objects in the question")  # fmt: skip
    show_every: int = setting(20, "steps between decoded samples in samples.jsonl")


PRESETS = {
    "toy": {
        "load": "fp32", "keep_features": True, "micro_batch": 4, "lr": 1e-3, "lora_rank": 32, "lora_alpha": 32, "steps": 60,
        "train_batch": 16, "group_size": 8, "max_new_tokens": 224, "locate": 0.2, "beta": 0.03, "warmup": 0.05,
        # At temperature 1 one unlikely token spoils many samples; these types have answers that are right or wrong.
        "temperature": 0.5, "types": ["relative direction", "relative distance"],
        "cold_lr": 3e-4, "cold_muon_lr": 0.003, "cold_tune": "full", "cold_optimizer": "muon", "cold_steps": 240,
        "cold_mix": 2.0, "cold_eval_every": 40, "eval_every": 20, "save_every": 30,
    },
    # The paper: 8 questions a step, beta .01, 1,024 new tokens, temperature 1, one epoch. Its script has G = 4; we sample 8.
    "3b": {
        "train_batch": 8, "group_size": 8, "lr": 1e-5, "checkpointing": True, "eval_batch": 16,
        "min_picture_tokens": 16, "max_picture_tokens": 128,
    },
}  # fmt: skip


def check(settings):
    """Raise SystemExit for settings that GRPO cannot work with."""
    if settings.group_size < 2:
        raise SystemExit(f"--group_size {settings.group_size} leaves nothing to compare with: use at least 2.")
    if settings.beta and settings.tune != "lora":
        raise SystemExit("--tune full has no adapter to switch off, so there is no reference: use --beta 0 or --tune lora.")
    if settings.train_vision:
        raise SystemExit("--train_vision: stage 3 keeps the vision tower frozen; its rollouts share the pictures' features.")
    if settings.train_batch < runs.world_size():
        raise SystemExit(f"--train_batch {settings.train_batch} cannot be shared by {runs.world_size()} processes: raise it.")
    if round(settings.locate * settings.train_batch) >= settings.train_batch:
        raise SystemExit(f"--locate {settings.locate} leaves no spatial question among {settings.train_batch}: lower it.")


# ------------------------------------------------------------------------------------------------
# 2. The cold start: SFT on thinking traces
# ------------------------------------------------------------------------------------------------


def cold_packs(settings, backbone):
    """Packs of thinking traces, and for each trace cold_mix rows of the stages before: what is not trained on is forgotten."""
    def load(kinds):
        scenes = runs.training_scenes(settings, kinds, backbone)
        return common.make_packs(backbone.tokenizer, scenes, settings.branches, settings.seed)

    packs = load(["coldstart"])
    wanted = round(settings.cold_mix * sum(len(pack.pairs) for pack in packs))
    if wanted:
        others = load(["spatial", "locate"] + ["worked"] * (Path(settings.data) / common.FILES["worked"]).is_file())
        for pack in common.batch_at(others, 0, len(others), settings.seed):
            if wanted > 0:
                packs.append(pack)
                wanted -= len(pack.pairs)
    return packs


def sampled_format(backbone, probe, settings, run):
    """Sample answers to the scenes `probe`: {"format": share that is well formed and legal, "accuracy_given_format"}."""
    runs.seed_step(settings, run.step + 1)
    examples, texts = runs.generate_answers(
        backbone, probe, "think", settings.max_new_tokens, settings.temperature, settings.eval_batch, settings.keep_features
    )
    accuracy, legal = common.score_answers(texts, examples)
    formed = (common.score_format(texts) > 0) & legal  # (N,)
    run.log_samples(examples, texts)
    return {"format": float(formed.mean()), "accuracy_given_format": float(accuracy[formed].mean()) if formed.any() else 0.0}


def train_cold_start(backbone, packs, probe, settings, run):
    """SFT as in stages 1 and 2, until cold_format is reached. probe: training scenes (held-out ones must not decide this)."""
    if not packs:
        raise SystemExit(f"{settings.data} has nothing to learn for this stage.")
    memory.check_memory(backbone, settings, memory.pack_lengths(backbone, packs), settings.max_new_tokens)
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
        scores = sampled_format(backbone, probe, settings, run) if run.is_eval_step() else {}
        run.log(row, scores, [e for pack in batch for e in pack.scene.examples])
        if scores and scores["format"] >= settings.cold_format:
            run.end()


def cold_start(settings):
    """Train the cold start from stage 2's model, unless it is finished. Returns the folder of its model.

    Raises SystemExit if it was made with other settings than these, from another model or other data.
    """
    cold = replace(
        settings, out=str(Path(settings.out).parent / "coldstart"), lr=settings.cold_lr, muon_lr=settings.cold_muon_lr,
        tune=settings.cold_tune, optimizer=settings.cold_optimizer, steps=settings.cold_steps,
        train_batch=settings.cold_train_batch, eval_every=settings.cold_eval_every, types=[],
        resume="never" if settings.resume == "never" else "auto",
    )  # fmt: skip
    names = ["preset", "model", "data", "seed", "load", "min_picture_tokens", "max_picture_tokens", "branches", "warmup", "clip",
             "eval_scenes", "seconds_per_grid", "fps"]  # fmt: skip
    names += ["lora_rank", "lora_alpha"] * (cold.tune == "lora") + [name for name in vars(cold) if name.startswith("cold_")]
    if not runs.is_finished(cold, names):
        run = runs.Run(cold, {"loss": ["loss"], "sampled, training scenes": ["format", "accuracy_given_format"]})
        backbone = common.load_backbone(cold.model, cold.load, cold.min_picture_tokens, cold.max_picture_tokens, runs.device())
        packs = cold_packs(cold, backbone)
        probe = common.batch_at(runs.training_scenes(cold, ["spatial"], backbone), 0, 48, 1)
        common.adapt(backbone, cold)
        train_cold_start(backbone, packs, probe, cold, run)
        run.finish(backbone)
    return f"{cold.out}/model"


# ------------------------------------------------------------------------------------------------
# 3. The idea: group relative policy optimisation
# ------------------------------------------------------------------------------------------------


def prompt_ids(backbone, example):
    """Token ids of the question and of the start of the answer."""
    text = common.prompt_text(example, "locate" if example.question_type == "locate" else "think") + common.BRANCH_END
    return list(common.encode_text(backbone.tokenizer, text))


def rollout(backbone, prompts, settings):
    """Sample a group of completions for each prompt. prompts: B pairs (Scene, Example).

    Returns prefixes (B Prefix: system prompt, pictures, question) and completions (B lists of G lists of ids).
    """
    scenes = common.encode_scenes(backbone, [scene for scene, _ in prompts], settings.keep_features)
    prefixes = [common.extend_prefix(prefix, prompt_ids(backbone, e)) for prefix, (_, e) in zip(scenes, prompts)]
    empty = [[[]] * settings.group_size for _ in prefixes]  # the branches of a rollout start with nothing
    return prefixes, common.branch_generate(backbone, prefixes, empty, settings.max_new_tokens, settings.temperature)


def rewards(texts, examples, settings):
    """Reward terms of N completions: {name: (N,) in [0, 1]}. The reward is their sum; each is logged under its name.

    Localisation answers have no tags: their format is a legal JSON list of boxes, their accuracy the mean IoU.
    """
    accuracy, legal = common.score_answers(texts, examples)  # (N,), (N,)
    form = common.score_format(texts)  # (N,)
    located = np.array([example.question_type == "locate" for example in examples])
    form = np.where(located, 1.0, form) * (legal if settings.legal_format else np.where(located, legal, True))
    # Accuracy counts only inside an <answer> block: a bare letter must not be rewarded.
    tagged = np.array([common.ANSWER.search(text) is not None for text in texts])
    terms = {"format": form, "accuracy": accuracy * (tagged | located)}
    return terms | ({"boxes": settings.locate_reward * thought_iou(texts, examples)} if settings.locate_reward else {})


def thought_iou(texts, examples):
    """Grounded thinking (arXiv 2601.01984): the mean IoU of the boxes that a completion writes before its answer with the boxes
    of the objects in the question, paired by label: (N,). 0 for an example without boxes."""
    out = np.zeros(len(texts))
    for row, (text, example) in enumerate(zip(texts, examples)):
        lists = re.findall(r"\[\{.*?\}\]", text.split("<answer>")[0], re.DOTALL)
        written = [box for some in lists for box in common.parse_boxes(some) or []]
        if written and example.boxes:
            found = common.match_boxes(written, example.boxes)
            out[row] = common.box_iou(found, [box["bbox_2d"] for box in example.boxes]).mean()
    return out


def group_advantages(reward, scale=True):
    """A = (r - mean) / (std + 1e-4) within each group (DeepSeekMath, section 4.1.2). reward (B, G) -> (B, G).

    Without `scale` there is no division, which gives more weight to very easy and very hard questions (arXiv 2503.20783).
    """
    centred = reward - reward.mean(1, keepdim=True)  # (B, G)
    return centred / (reward.std(1, keepdim=True) + 1e-4) if scale else centred


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, settings, sequences, tokens):
    """The clipped objective, negated, divided so that the sum over all parts of a step is the step's loss.

    logps, old_logps, ref_logps (N, C): of the policy now, the policy that sampled, the reference (None: no KL).
    advantages (N,). mask (N, C): completion tokens that count, the end token included. sequences, tokens: N and mask.sum() of
    the whole step. Returns the loss (scalar) and {"kl", "clip"}, sums over tokens for the log.
    """
    ratio = (logps - old_logps).exp()  # (N, C); with mu = 1 it is 1 and the loss is about 0: watch the reward instead
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)  # (N, C)
    advantages = advantages[:, None]  # (N, 1): one advantage for all tokens of a completion
    objective = torch.min(ratio * advantages, clipped * advantages)  # (N, C), for both signs of the advantage
    stats = {"clip": ((ratio * advantages > clipped * advantages) & mask).sum().item(), "kl": 0.0}
    if ref_logps is not None:
        gap = ref_logps - logps  # (N, C)
        kl = gap.exp() - gap - 1  # k3: unbiased, never negative (DeepSeekMath, equation 4)
        objective = objective - settings.beta * kl
        stats["kl"] = (kl * mask).sum().item()
    if settings.loss_average == "sequence":
        loss = -((objective * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    elif settings.loss_average == "token":  # long completions count more
        loss = -(objective * mask).sum() / tokens
    else:  # a constant: the length has no influence
        loss = -(objective * mask).sum() / (sequences * settings.max_new_tokens)
    return loss, stats


# ------------------------------------------------------------------------------------------------
# 4. The loop
# ------------------------------------------------------------------------------------------------


def update(backbone, optimizers, prefixes, groups, advantages, counted, live, settings, step, steps):
    """mu updates with one rollout. prefixes, groups: as from rollout. advantages (B, G); counted (B, G): completions in the loss;
    live: the groups that teach something.

    Returns the gradient norm and {"kl", "clip", "entropy", "tokens"}, sums over this process's completion tokens.
    """
    lengths = torch.tensor([[len(ids) for ids in group] for group in groups])  # (B, G)
    sequences, tokens = runs.all_reduce([float(counted.sum()), float((lengths * counted).sum())])
    parts = [live[i : i + settings.micro_batch] for i in range(0, len(live), settings.micro_batch)]
    old, reference, sums, norm = {}, {}, dict.fromkeys(("kl", "clip", "entropy", "tokens"), 0.0), 0.0
    for number_of_update in range(settings.mu):
        backbone.model.train()
        for number, part in enumerate(parts):
            # Old and reference log-probabilities come from this scoring pass, too; never from branch_generate.
            some, branches = [prefixes[i] for i in part], [[([], ids) for ids in groups[i]] for i in part]
            if number_of_update == 0 and settings.beta:
                with torch.no_grad(), backbone.model.disable_adapter():
                    reference[number] = common.branch_logprobs(backbone, some, branches, settings.temperature)[0]
            logps, entropy, mask = common.branch_logprobs(backbone, some, branches, settings.temperature)  # (N, C)
            old.setdefault(number, logps.detach())
            mask = mask & counted[part].flatten()[:, None].to(mask.device)
            loss, stats = grpo_loss(
                logps, old[number], reference.get(number), advantages[part].flatten(), mask, settings, sequences, tokens
            )
            loss.backward()
            stats |= {"entropy": (entropy * mask).sum().item(), "tokens": mask.sum().item()}
            sums = {name: sums[name] + stats[name] for name in sums}
        runs.all_reduce_gradients(backbone.model.parameters())
        norm = runs.optimizer_step(backbone.model, optimizers, settings, step, steps)
    return norm, sums


@torch.no_grad()
def compare_with_rows(backbone, prefix, group):
    """Print how far branch_logprobs is from one plain row a completion: on a GPU the two run different attention kernels."""
    together, _, mask = common.branch_logprobs(backbone, [prefix], [[([], ids) for ids in group]], temperature=1.0)  # (G, C)
    alone = torch.cat([common.row_logprobs(backbone, prefix, ids) for ids in group])  # (completion tokens,)
    gap = (together[mask] - alone).abs()
    common.print0(f"log-probabilities of shared prefixes against separate rows: {gap.mean():.1e} apart, at most {gap.max():.1e}")


def means(columns):
    """The mean of each column over all processes. columns: {name: (N,)} -> {name: float}."""
    sums = runs.all_reduce([float(len(next(iter(columns.values()))))] + [float(sum(column)) for column in columns.values()])
    return {name: value / sums[0] for name, value in zip(columns, sums[1:])}


def evaluate(backbone, questions, boxes, settings):
    """Mean scores of greedy answers after thinking: {"think", "iou" (with --locate)}. questions, boxes: lists of Scene."""
    scores = {}
    for name, scenes in (("think", questions), ("iou", boxes)):
        if scenes:
            examples, texts = runs.generate_answers(
                backbone, scenes, "think", settings.max_new_tokens, eval_batch=settings.eval_batch, keep=settings.keep_features
            )
            scores[name] = float(common.score_answers(texts, examples)[0].mean())
    return scores


def grpo(backbone, prompts, questions, boxes, settings, run):
    """Rollout, rewards, advantages, update. prompts: [(Scene, Example)] to learn from; questions, boxes: held-out scenes."""
    located = [prompt for prompt in prompts if prompt[1].question_type == "locate"]
    asked = [prompt for prompt in prompts if prompt[1].question_type != "locate"]
    if not asked:
        raise SystemExit(f"{settings.data} has no spatial questions to ask.")
    n_located = round(settings.locate * settings.train_batch) if located else 0
    n_asked, group_size = settings.train_batch - n_located, settings.group_size
    steps = settings.steps or max(1, len(asked) // n_asked)
    optimizers = runs.make_optimizers(backbone.model, settings)
    check_memory(backbone, prompts, settings)
    for step in run.steps(steps, backbone, optimizers):
        began = time.time()
        batch = common.batch_at(asked, step, n_asked, settings.seed)
        batch += common.batch_at(located, step, n_located, settings.seed) if n_located else []
        mine = runs.share(batch)  # B prompts of this process: a group stays in one process

        # Rollout: G completions of every question, N = B * G in all.
        with run.check_finite():
            prefixes, groups = rollout(backbone, mine, settings)
        if step == run.first and backbone.device.type == "cuda":
            compare_with_rows(backbone, prefixes[0], groups[0])
        completions = [ids for group in groups for ids in group]
        texts = [common.decode(backbone, ids) for ids in completions]
        examples = [example for _, example in mine for _ in range(group_size)]
        ended = torch.tensor([ids[-1] in backbone.stop for ids in completions]).view(-1, group_size)  # (B, G)
        rollout_seconds = time.time() - began

        # Rewards and advantages.
        terms = rewards(texts, examples, settings)  # {name: (N,)}
        reward = torch.tensor(sum(terms.values()), dtype=torch.float32).view(-1, group_size)  # (B, G)
        advantages = group_advantages(reward, settings.scale_rewards).to(backbone.device)  # (B, G)
        alive = reward.std(1) > 0  # (B,) a group of equal rewards teaches nothing
        run.panels["reward"] = ["reward", *terms]

        # Update. The policy that sampled is the policy before the first update.
        counted = ended if settings.mask_overlong else torch.ones_like(ended)  # (B, G) completions in the loss
        live = [i for i in range(len(mine)) if alive[i] and counted[i].any()]
        live.sort(key=lambda i: len(prefixes[i].ids))  # what is computed together is padded to the longest
        grad_norm, sums = update(backbone, optimizers, prefixes, groups, advantages, counted, live, settings, step, steps)

        # Log: means over all processes; kl, clip and entropy are means over tokens.
        repeated = {"reward_std": reward.std(1), "dead_groups": ~alive}  # one value a group
        row = means({
            "reward": reward.flatten(), **terms, "completion_tokens": list(map(len, completions)), "cut": ~ended.flatten(),
            **{name: value.repeat_interleave(group_size) for name, value in repeated.items()},
        })  # fmt: skip
        *over_tokens, tokens = runs.all_reduce(list(sums.values()))
        row |= {name: value / max(tokens, 1) for name, value in zip(sums, over_tokens)} | {"grad_norm": grad_norm}
        row |= {"rollout_seconds": rollout_seconds, "update_seconds": time.time() - began - rollout_seconds}
        if row["cut"] > 0.5:
            common.print0(f"step {step + 1}: {row['cut']:.0%} of the completions were cut: raise --max_new_tokens")
        if step % settings.show_every == 0:
            run.log_samples(examples, texts, **terms, advantage=advantages.flatten())
        scores = evaluate(backbone, questions, boxes, settings) if run.is_eval_step() else {}
        run.log(row, scores, [example for _, example in batch])


def check_memory(backbone, prompts, settings):
    """memory.check_memory for a step of GRPO with the longest prompts."""
    prefix = max(memory.scene_length(backbone, scene) for scene in {id(scene): scene for scene, _ in prompts}.values())
    prefix += len(prompt_ids(backbone, max((e for _, e in prompts), key=lambda e: len(common.prompt_text(e, "think")))))
    share = math.ceil(settings.train_batch / runs.world_size())
    longest = [(prefix, [(0, settings.max_new_tokens)] * settings.group_size)] * min(settings.micro_batch, share)
    rollout = share * (prefix + settings.group_size * settings.max_new_tokens)  # tokens in its cache
    memory.check_memory(backbone, settings, longest, settings.max_new_tokens, rollout)


# ------------------------------------------------------------------------------------------------
# 5. Main
# ------------------------------------------------------------------------------------------------


def work(settings):
    """The cold start, then GRPO from its model. Every process runs this."""
    check(settings)
    first = Path(settings.out).parent / "coldstart" / "model" if settings.cold_start else settings.model
    if runs.is_finished(settings, more={"cold start": runs.model_files(first)}):
        return
    if not settings.cold_start:
        common.print0(f"no cold start: GRPO starts from {settings.model}")
    model = cold_start(settings) if settings.cold_start else settings.model
    run = runs.Run(settings, {
        "reward": ["reward"], "groups": ["reward_std", "dead_groups", "cut"],
        "held-out scores": ["think", "iou"], "policy": ["kl", "entropy"],
    }, {"cold start": runs.model_files(model)})  # fmt: skip
    backbone = common.load_backbone(model, settings.load, settings.min_picture_tokens, settings.max_picture_tokens, runs.device())
    kinds = ["spatial"] + ["locate"] * (settings.locate > 0)
    prompts = [(scene, e) for scene in runs.training_scenes(settings, kinds, backbone) for e in scene.examples]
    questions = runs.held_out_scenes(settings, ["spatial"], backbone)
    boxes = runs.held_out_scenes(settings, ["locate"], backbone) if settings.locate else []
    if settings.locate_reward and not any(example.boxes for _, example in prompts):
        raise SystemExit(f"--locate_reward: no row of {settings.data} has boxes. Make the data with stage0_data.py, or use 0.")
    for _, example in prompts if settings.locate_reward else []:
        example.boxes = common.boxes_for_model(backbone, replace(example, answer=example.boxes or []))
    common.adapt(backbone, settings)
    grpo(backbone, prompts, questions, boxes, settings, run)
    run.finish(backbone)


def main():
    """Read the settings and start the processes."""
    runs.launch(work, runs.parse_settings(GRPOSettings, PRESETS, "stage3", before="stage2"), graceful=True)


if __name__ == "__main__":
    main()
