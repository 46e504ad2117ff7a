"""Rules on several keys of a recipe at once. A new rule is a function here and a line in RULES.

Each rule is named after the mistake that it finds. It takes a recipe whose keys are each valid and
returns the message, `KEY.PATH: what is wrong; what to do`, or None where the recipe is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distill.config.objective_schema import network_types, networks_of
from distill.config.schema import PAIRS, GuidanceSection, RewardSection
from distill.objectives.adversarial.wavediff import WaveDiff
from distill.objectives.games import Adversary
from distill.objectives.smaller.gft import GuidanceFree
from distill.objectives.smaller.guide import Guide
from students.critic import Critic, FeatureMean
from teachers.denoiser import Denoiser
from teachers.errors import cut, nearest
from teachers.quantised import FORMS
from teachers.solver import STATES

if TYPE_CHECKING:
    from distill.config.recipe import Recipe


LEAST, MOST = 1e-18, 1e18  # of an objective's numbers other than 0


def broken_rule(recipe: Recipe) -> str | None:
    """The message of the first rule that the recipe breaks, or None."""
    messages = (rule(recipe) for rule in RULES)
    return next((message for message in messages if message is not None), None)


# ---- players, adapters, the critic


def unknown_player(recipe: Recipe) -> str | None:
    players = _players(recipe)
    for player in recipe.players:
        if player not in players:
            return (
                f"players.{cut(player)}: {_objective(recipe)} has no such player; "
                f"{nearest(player, players)}"
            )
    return None


def players_out_of_turn(recipe: Recipe) -> str | None:
    steps = recipe.train.steps
    for name, player in recipe.players.items():
        if player.begins >= steps:
            return (
                f"players.{cut(name)}.begins: training ends at step {steps:,}, and it begins to "
                f"learn at step {player.begins:,}; lower it, or raise train.steps"
            )
        known = _players(recipe)
        if player.waits is not None and player.waits.player not in known:
            return (
                f"players.{cut(name)}.waits.scalar: {cut(player.waits.scalar)!r} is of no player; "
                f"write PLAYER/NAME, such as {known[0]}/loss, of {', '.join(known)}"
            )
    return None


def no_adapted_players(recipe: Recipe) -> str | None:
    if recipe.adapters is not None and recipe.adapters.players == ():
        return "adapters.players: the list is empty; name a player, or remove the section"
    return None


def unknown_adapted_player(recipe: Recipe) -> str | None:
    copies = _copies(recipe)
    for player in _adapted_players(recipe):
        if player not in copies:
            return (
                f"adapters.players: {_objective(recipe)} has no such network as {player!r}; "
                f"{nearest(player, copies)}"
            )
    return None


def architecture_of_another_start(recipe: Recipe) -> str | None:
    if recipe.student.architecture is None or recipe.student.init is None:
        return None
    return "student.architecture: student.init has one of its own; remove one of the two"


def architecture_under_adapters(recipe: Recipe) -> str | None:
    """An adapter is on the teacher's own weights, which have the teacher's architecture."""
    if recipe.student.architecture is None or recipe.adapters is None:
        return None
    if "student" not in (recipe.adapters.players or ("student",)):
        return None
    return (
        "student.architecture: an adapter is on the teacher's own network; name other networks in "
        "adapters.players, or remove adapters"
    )


def format_under_adapters(recipe: Recipe) -> str | None:
    """Rounding is of whole weights, which an adapter leaves to the teacher."""
    if recipe.student.format is None or recipe.adapters is None:
        return None
    if "student" not in (recipe.adapters.players or ("student",)):
        return None
    return (
        "student.format: an adapter is not rounded, nor the teacher's weights under it; name other "
        "networks in adapters.players, or round the student afterwards with distill quantise"
    )


def format_of_no_student(recipe: Recipe) -> str | None:
    if recipe.student.format is None or (recipe.kind.few_step and recipe.kind.trains == "student"):
        return None
    return f"student.format: {_objective(recipe)} makes no few-step student; remove it"


def unset_haar(recipe: Recipe) -> str | None:
    if (a := recipe.student.architecture) is None:
        return None
    if a.haar and not a.fresh:
        return (
            "student.architecture.haar: the first and last layers have coefficients in place of "
            "pixels, and no weights of the teacher's; set fresh to true"
        )
    if a.noise and not a.haar:
        return "student.architecture.noise: only networks with haar read it; set haar, or remove it"
    return None


def empty_architecture(recipe: Recipe) -> str | None:
    if (a := recipe.student.architecture) is None:
        return None
    if a.network is None and not (
        a.config or a.remove or a.change or a.haar or a.decoder_times > 1
    ):
        return "student.architecture: it changes nothing; give config, remove or change"
    if repeated := [n for n in a.remove if a.remove.count(n) > 1]:
        return f"student.architecture.remove: {cut(repeated[0])!r} is there twice; name it once"
    return None


def one_pass_of_other_times(recipe: Recipe) -> str | None:
    """The decoder of a one-pass student runs at its own times, whatever time it is called at."""
    if (a := recipe.student.architecture) is None or a.decoder_times == 1:
        return None
    key = "student.architecture.decoder_times"
    if recipe.student.steps != 1:
        return f"{key}: they are the steps, and run as one; set student.steps to 1"
    for option in ("schedule", "alignment"):  # dmd2's
        if recipe.objective.get(option) is not None:
            return f"objective.{option}: a student with decoder_times has no other time; remove it"
    if recipe.kind.learns != "chains" or recipe.kind.between_steps:
        return (
            f"{key}: {_objective(recipe)} calls the student at other times than its first; name an "
            "objective that learns from its samples, such as dmd2, or remove the key"
        )
    if recipe.critic is not None and recipe.critic.reads == "student":
        return f"{key}: a critic at all times cannot read such a student; remove critic.reads"
    if recipe.train.compile == "full":
        return f"{key}: its halves are compiled by blocks alone; set train.compile to blocks or off"
    return None


CHANGES = (
    "config",
    "remove",
    "rename",
    "fresh",
    "change",
    "haar",
    "noise",
)  # of a teacher's network


def network_beside_changes(recipe: Recipe) -> str | None:
    a = recipe.student.architecture
    if a is None or a.network is None:
        return None
    changes = (k for k in CHANGES if getattr(a, k))
    if changed := next(changes, "decoder_times" if a.decoder_times > 1 else None):
        return (
            f"student.architecture.{changed}: it changes the teacher's network, and network names "
            "another one; remove one of the two"
        )
    if recipe.kind.few_step and recipe.kind.trains == "student":
        return None
    return (
        f"student.architecture.network: {_objective(recipe)} trains no few-step student; remove it"
    )


def trained_quantised_weights(recipe: Recipe) -> str | None:
    if recipe.teacher.precision in FORMS and (recipe.adapters is None or not recipe.kind.few_step):
        return (
            f"{_quantised(recipe)} cannot be trained; add 'adapters: {{}}' to an objective that "
            "distils, or set teacher.precision to bf16"
        )
    return None


def copied_quantised_weights(recipe: Recipe) -> str | None:
    if recipe.teacher.precision not in FORMS:
        return None
    adapted = _adapted_players(recipe) or _copies(recipe)
    for player in _copies(recipe):
        if player not in adapted:
            return (
                f"{_quantised(recipe)} cannot be trained, and {player} is a copy; name it in "
                "adapters.players, or set teacher.precision to bf16"
            )
    return None


def dora_on_quantised_weights(recipe: Recipe) -> str | None:
    if recipe.teacher.precision not in FORMS or recipe.adapters is None:
        return None
    if recipe.adapters.kind == "dora":
        return (
            f"{_quantised(recipe)} have other norms than the full-precision weights that DoRA is "
            "merged into; set adapters.kind to lora"
        )
    return None


def section_of_a_student(recipe: Recipe) -> str | None:
    """Where an objective trains no student, what only a student has."""
    if recipe.kind.trains == "student":
        return None
    adapted = _adapted_players(recipe)
    found = {
        "adapters": recipe.adapters is not None
        and ("student" in adapted or _copies(recipe) == ["student"]),
        "student": recipe.student != type(recipe.student)(),
        "rewards": bool(recipe.rewards),
        "train.guards": recipe.train.guards is not None,
        "train.ema_lengths": recipe.train.ema_lengths is not None,
        "eval.every": recipe.eval.every > 0,
        "eval.metric": recipe.eval.metric is not None,
    }
    for key, given in found.items():
        if given:
            return f"{key}: {_objective(recipe)} trains no student; remove it"
    return None


def gates_of_recomputed_blocks(recipe: Recipe) -> str | None:
    if recipe.kind.trains != "gates" or not recipe.train.checkpointing:
        return None
    return (
        f"train.checkpointing: {_objective(recipe)}'s gates are gone when activations are computed "
        "again; set it to false"
    )


def discriminator_of_other_features(recipe: Recipe) -> str | None:
    """A discriminator's logits are log-density ratios, read off the teacher that they move."""
    if recipe.kind.trains != "critic" or recipe.critic is None:
        return None
    critic, who = recipe.critic, _objective(recipe)
    if critic.encoder is not None or critic.reads not in (None, "teacher"):
        key = "reads" if critic.encoder is None else "encoder"
        return f"critic.{key}: {who}'s critic reads the teacher, which it moves; remove it"
    if critic.san:
        return f"critic.san: {who}'s logits are log-density ratios, and SAN's are not; remove it"
    return None


def useless_critic(recipe: Recipe) -> str | None:
    if recipe.critic is not None and "critic" not in networks_of(recipe.kind):
        return f"critic: {_objective(recipe)} has no critic; remove the section"
    return None


def missing_critic(recipe: Recipe) -> str | None:
    if recipe.critic is None and networks_of(recipe.kind).get("critic"):
        return f"critic: {_objective(recipe)} needs one; add the section 'critic: {{}}'"
    return None


def san_without_a_game(recipe: Recipe) -> str | None:
    if recipe.critic is not None and recipe.critic.san and not issubclass(recipe.kind, Adversary):
        return (
            f"critic.san: {_objective(recipe)} has no loss for the directions of a SAN critic; "
            "remove it, or take ladd, gdd or dmd2"
        )
    if recipe.critic is not None and recipe.critic.san and issubclass(recipe.kind, WaveDiff):
        return "critic.san: this critic reads two states, and has no directions; remove it"
    return None


def unused_option(recipe: Recipe) -> str | None:
    fields = recipe.kind.__dataclass_fields__
    for name in recipe.kind.unused:
        if recipe.objective[name] != fields[name].default:
            return f"objective.{name}: {_objective(recipe)} has no use for it; remove it"
    return None


def features_of_another_network(recipe: Recipe) -> str | None:
    critic = recipe.critic
    if critic is None or (critic.encoder is None and critic.reads is None):
        return None
    key = "reads" if critic.encoder is None else "encoder"
    if critic.reads != "fake" and issubclass(
        network_types(recipe.kind, Critic)["critic"], FeatureMean
    ):
        return (
            f"critic.{key}: {_objective(recipe)}'s critic is the fake score itself, which learns "
            "from its loss; remove it"
        )
    if critic.encoder is not None and critic.reads is not None:
        return "critic.reads: the critic reads the encoder; remove one of the two keys"
    if critic.reads == "student" and recipe.train.checkpointing:
        return (
            "critic.reads: the student's features are read with its weights held, which recomputed "
            "activations do not know; set it to teacher, or train.checkpointing to false"
        )
    if critic.reads == "fake" and "fake" not in network_types(recipe.kind):
        return (
            f"critic.reads: {_objective(recipe)} has no fake score; set it to teacher, or remove it"
        )
    return None


def reach_without_a_zero(recipe: Recipe) -> str | None:
    if not issubclass(recipe.kind, Adversary) or recipe.objective["reach"] is None:
        return None
    if recipe.objective["game"] != "relativistic":
        return None
    return (
        "objective.reach: it follows the signs of data's logits, and in the relativistic game only "
        "differences mean something; remove it, or set objective.game to another"
    )


def second_derivative_of_recomputed_blocks(recipe: Recipe) -> str | None:
    if not issubclass(recipe.kind, Adversary) or not recipe.train.checkpointing:
        return None
    keys = recipe.objective
    if recipe.critic is None or keys["penalty"] != "exact" or not (keys["r1"] or keys["r2"]):
        return None
    return (
        "objective.penalty: exact takes second derivatives, and train.checkpointing allows none; "
        "set it to features or approximate, or train.checkpointing to false"
    )


def missing_reward(recipe: Recipe) -> str | None:
    learned = [r for r in recipe.rewards.values() if not r.held_out]
    if recipe.kind.needs_reward and not learned:
        return (
            f"rewards: missing; {_objective(recipe)} learns from them; name a function, as in "
            "'rewards: {mine: {function: mine.py:reward}}'"
        )
    return None


def reward_without_effect(recipe: Recipe) -> str | None:
    """Refuse keys of a reward that nothing reads."""
    for name, reward in recipe.rewards.items():
        message = _unread(recipe, reward) or _unusable(recipe, reward)
        if message is not None:
            return f"rewards.{cut(name)}.{message}"
    return None


def guard_of_no_reward(recipe: Recipe) -> str | None:
    guards = recipe.train.guards
    if guards is None or any(r.held_out for r in recipe.rewards.values()):
        return None
    if guards.held_out != type(guards).model_fields["held_out"].default:
        return (
            "train.guards.held_out: no reward is held out; set held_out of a reward to true, or "
            "remove it"
        )
    return None


def _unread(recipe: Recipe, reward: RewardSection) -> str | None:
    plain = RewardSection(function=reward.function)
    keys = ("kind", "temperature", "floor", "balance", "begins", "warmup")
    given = [k for k in keys if getattr(reward, k) != getattr(plain, k)]
    if recipe.kind.needs_reward and not reward.held_out and "floor" in given:
        given.remove("floor")  # part of the reward's value
    if not given:
        return None
    if reward.held_out:
        return f"{given[0]}: no loss contains a reward that is held out; remove it"
    if recipe.kind.needs_reward:
        return (
            f"{given[0]}: {_objective(recipe)} has the reward in its own loss, which does not read "
            "it; remove it"
        )
    if reward.kind == "weighted" and reward.balance:
        return "balance: a weighted reward has no gradient; remove it"
    if reward.kind == "direct" and "temperature" in given:
        return "temperature: a direct reward has none; remove it, or set another kind"
    return None


def _unusable(recipe: Recipe, reward: RewardSection) -> str | None:
    train = recipe.train
    if reward.held_out and train.guards is None:
        return "held_out: train.guards measure it; add 'guards: {}' to train"
    if reward.kind == "ranked" and train.batch // train.accumulate < 2:
        return (
            "kind: ranked compares samples of a part of a batch, and it has one; raise "
            "train.batch, or lower train.accumulate"
        )
    if reward.begins >= train.steps:
        return f"begins: training ends at step {train.steps:,}; lower it, or raise train.steps"
    return None


# ---- the objective's numbers


def extreme_number(recipe: Recipe) -> str | None:
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    return _extreme(keys, "objective")


def _extreme(value: Any, key: str) -> str | None:
    """The message about the first number whose square a float32 cannot hold."""
    if isinstance(value, dict):
        messages = (_extreme(v, f"{key}.{k}") for k, v in value.items())
        return next((message for message in messages if message is not None), None)
    if not isinstance(value, float) or value == 0 or LEAST <= abs(value) <= MOST:
        return None
    return (
        f"{key}: {value:g} is so far from 1 that its square is no number of 32 bits; give one "
        f"between {LEAST:g} and {MOST:g}"
    )


# ---- data


def missing_pairs(recipe: Recipe) -> str | None:
    if recipe.kind.needs_data != PAIRS or recipe.data.source == PAIRS:
        return None
    return (
        f"data.source: {_objective(recipe)} learns from the teacher's own samples and the noise of "
        "each; set it to 'pairs'"
    )


def pairs_without_states(recipe: Recipe) -> str | None:
    states, network = recipe.data.states, recipe.student.network
    if not recipe.kind.needs_states:
        return None
    if network is None:
        return (
            f"student.architecture: missing; {_objective(recipe)} trains a network of several "
            "outputs; write it as {network: dsno}"
        )
    if states is None or (network == "dsno" and states != STATES):
        return (
            f"data.states: {'missing' if states is None else states}; {_objective(recipe)} learns "
            f"from states of the teacher's trajectory, one for each output; set it to {STATES}"
        )
    return None


def pairs_of_several_scales(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    if recipe.kind.needs_data != PAIRS or not isinstance(guidance, GuidanceSection):
        return None
    if guidance.range is None:
        return None
    return (
        f"teacher.guidance.scale: {_objective(recipe)} learns from samples that the teacher made "
        "at one scale, and a range would show them to the student at others; give one number"
    )


def useless_pairs(recipe: Recipe) -> str | None:
    if recipe.data.source == PAIRS and not recipe.needs_data:
        return f"data.source: {_objective(recipe)} learns from no data; remove the pairs"
    return None


def key_of_pairs(recipe: Recipe) -> str | None:
    if recipe.data.source == PAIRS:
        for key in ("targets", "masks", "captions", "size", "buckets"):
            if getattr(recipe.data, key) is not None:
                return f"data.{key}: pairs have none; remove it"
        return None
    for key in ("path", "count", "solver", "steps", "inverted", "images", "states"):
        if getattr(recipe.data, key) is not None:
            return f"data.{key}: only pairs have it; set data.source to 'pairs', or remove it"
    return None


def missing_data(recipe: Recipe) -> str | None:
    if not recipe.needs_data or recipe.data.source is not None:
        return None
    reason, remedy = "it learns from", ""
    if recipe.kind.needs_data == "critic":
        reason = "its critic compares with"
        if not networks_of(recipe.kind)["critic"]:
            remedy = ", or remove the critic section"
    return (
        f"data.source: missing; {_objective(recipe)} needs real data, which {reason}; set "
        f"data.source to 'digits' or a folder of images{remedy}"
    )


def coupling_without_data(recipe: Recipe) -> str | None:
    if recipe.data.coupling is not None and not recipe.needs_data:
        return (
            f"data.coupling: {_objective(recipe)} draws no data that noise could be coupled with; "
            "remove it"
        )
    return None


def coupling_of_pairs(recipe: Recipe) -> str | None:
    if recipe.data.coupling is not None and recipe.data.source == PAIRS:
        return "data.coupling: pairs have the noise that they were made from; remove it"
    return None


def key_of_another_coupling(recipe: Recipe) -> str | None:
    if (coupling := recipe.data.coupling) is None:
        return None
    fields = type(coupling).model_fields
    key, kinds = "candidates", "nearest alone has it"
    if coupling.kind == "nearest":
        key, kinds = "by_label", "assignments alone have it"
    if getattr(coupling, key) != fields[key].default:
        return f"data.coupling.{key}: {kinds}, and kind is {coupling.kind}; remove it"
    return None


def coupling_of_one_sample(recipe: Recipe) -> str | None:
    coupling, train = recipe.data.coupling, recipe.train
    if coupling is None or coupling.kind == "nearest" or train.batch > train.accumulate:
        return None
    return (
        "data.coupling: noise is assigned within a part of a batch, and parts of one sample leave "
        "nothing to assign; raise train.batch, or remove the key"
    )


def prompts_beside_images(recipe: Recipe) -> str | None:
    if recipe.data.prompts is not None and recipe.data.source not in (None, PAIRS):
        return (
            "data.prompts: the images of data.source have their own captions; remove one of the two"
        )
    return None


def partners_without_images(recipe: Recipe) -> str | None:
    for key in ("targets", "masks"):
        if getattr(recipe.data, key) is not None and recipe.data.source is None:
            return f"data.{key}: they belong to the images of data.source; set that as well"
    return None


def part_of_two_kinds(recipe: Recipe) -> str | None:
    if (where := recipe.data.where) is None:
        return None
    if (where.labels is None) == (where.words is None):
        given = "missing" if where.labels is None else "both are given"
        return f"data.where: labels or words: {given}; give one of the two"
    if recipe.eval.protocol is not None:
        return (
            "eval.protocol: it measures every condition, and data.where leaves some out; remove "
            "it, and measure what distill route makes of all parts, by distill eval"
        )
    return None


def buckets_without_images(recipe: Recipe) -> str | None:
    if recipe.data.buckets is not None and recipe.data.source in (None, "digits"):
        return "data.buckets: there are no images to sort; remove it"
    return None


# ---- the student's step counts


_NO_COUNTS = {  # by the objective's `learns`
    "chains": "student.counts is missing, so there is one count",
    "all-times": "this objective trains all times equally",
    "one-chain": "the last stage of this objective trains one count",
}


def weights_without_counts(recipe: Recipe) -> str | None:
    student, learns = recipe.student, recipe.kind.learns
    if student.weights is not None and (learns != "chains" or student.counts is None):
        return f"student.weights: nothing to weight, because {_NO_COUNTS[learns]}; remove it"
    return None


def weights_for_other_counts(recipe: Recipe) -> str | None:
    weights, counts = recipe.student.weights, recipe.student.counts
    if weights is not None and counts is not None and len(weights) != len(counts):
        return (
            f"student.weights: {len(weights)} weights for {len(counts)} counts; "
            "give one weight for each of student.counts"
        )
    return None


def counts_that_do_not_divide(recipe: Recipe) -> str | None:
    steps = recipe.student.steps
    for count in recipe.student.counts or ():
        if steps % count:
            return (
                f"student.counts: {count} does not divide student.steps, which is {steps}; a "
                "shorter chain takes every second, third, … time of the longest"
            )
    return None


def counts_without_steps(recipe: Recipe) -> str | None:
    steps, counts = recipe.student.steps, recipe.student.counts
    if counts is not None and (steps not in counts or len(set(counts)) < len(counts)):
        return (
            f"student.counts: {list(counts)} must contain student.steps, {steps}, and no count "
            "twice; correct the list"
        )
    return None


def gamma_of_chains(recipe: Recipe) -> str | None:
    student = recipe.student
    if student.gamma is None:
        return None
    if recipe.kind.learns != "all-times" or not student.renoise or student.gamma == 0:
        return (
            "student.gamma: it needs an objective that trains all times, such as tcd, and "
            "student.renoise; remove it, or for 0 set student.renoise to false"
        )
    return None


def landing_of_one_time(recipe: Recipe) -> str | None:
    if recipe.student.landing is not None and not recipe.kind.two_times:
        return f"student.landing: {_objective(recipe)} trains no flow map; remove it"
    return None


def counts_of_one_chain(recipe: Recipe) -> str | None:
    student, learns = recipe.student, recipe.kind.learns
    if learns == "one-chain" and student.counts not in (None, (student.steps,)):
        return f"student.counts: {_NO_COUNTS[learns]}; remove it, or train a student for each count"
    return None


# ---- guidance


_KINDS = {"eta": "apg", "threshold": "apg", "blocks": "skip", "weaker": "auto"}  # by key
_REQUIRED = ("blocks", "weaker")  # keys that their kind of guidance cannot do without


def guidance_key_of_another_kind(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    if not isinstance(guidance, GuidanceSection):
        return None
    for key, kind in _KINDS.items():
        if kind != guidance.kind and getattr(guidance, key) not in (None, ()):
            return f"teacher.guidance.{key}: only kind {kind!r} has it; remove it"
    return None


def missing_guidance_key(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    if not isinstance(guidance, GuidanceSection):
        return None
    for key in _REQUIRED:
        if _KINDS[key] == guidance.kind and getattr(guidance, key) in (None, ()):
            return f"teacher.guidance.{key}: kind {guidance.kind!r} needs it; add the key"
    return None


def misplaced_sampling_scale(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    if not isinstance(guidance, GuidanceSection):
        return None
    if guidance.range is None:
        if guidance.sampling_scale is not None:
            return (
                "teacher.guidance.sampling_scale: scale is one number, which samples are made with "
                "as well; remove it, or give scale a range"
            )
        return None
    low, high = guidance.range
    if low >= high:
        return (
            f"teacher.guidance.scale: low, {low:g}, is not below high, {high:g}; write it as "
            "[low, high]"
        )
    if not low <= guidance.one_scale <= high:
        return (
            f"teacher.guidance.sampling_scale: {guidance.one_scale:g} is outside the range "
            f"[{low:g}, {high:g}] of scale; give one inside it"
        )
    return None


def one_scale_of_many(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    ranged = isinstance(guidance, GuidanceSection) and guidance.range is not None
    if ranged or not issubclass(recipe.kind, GuidanceFree):
        return None
    return (
        f"teacher.guidance: {_objective(recipe)} learns a range of scales; write it as "
        "{scale: [1, 5], sampling_scale: 3}"
    )


def guide_of_several_scales(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    ranged = isinstance(guidance, GuidanceSection) and guidance.range is not None
    if not ranged or not issubclass(recipe.kind, Guide):
        return None
    return (
        "teacher.guidance.scale: a guide reads no scale and is of one; give one number, and train "
        "another guide for another scale"
    )


def empty_guidance_interval(recipe: Recipe) -> str | None:
    guidance = recipe.teacher.guidance
    if not isinstance(guidance, GuidanceSection) or guidance.interval is None:
        return None
    low, high = guidance.interval
    if low >= high:
        return (
            f"teacher.guidance.interval: low, {low:g}, is not below high, {high:g}; "
            "write it as [low, high]"
        )
    return None


def empty_discriminator_interval(recipe: Recipe) -> str | None:
    section = recipe.teacher.discriminator
    if section is None or section.interval is None:
        return None
    low, high = section.interval
    if low >= high:
        return (
            f"teacher.discriminator.interval: low, {low:g}, is not below high, {high:g}; "
            "write it as [low, high]"
        )
    return None


def discriminator_of_a_discriminator(recipe: Recipe) -> str | None:
    if recipe.kind.trains != "critic" or recipe.teacher.discriminator is None:
        return None
    return (
        f"teacher.discriminator: {_objective(recipe)} learns from samples of the teacher alone; "
        "remove it"
    )


# ---- training


def batch_that_does_not_divide(recipe: Recipe) -> str | None:
    batch, parts = recipe.train.batch, recipe.train.accumulate
    if batch % parts:
        return (
            f"train.batch: {batch} does not divide into train.accumulate = {parts} equal parts; "
            "set batch to a multiple of accumulate"
        )
    return None


def guards_without_an_average(recipe: Recipe) -> str | None:
    if recipe.train.guards is not None and not recipe.train.ema:
        return (
            "train.guards: they keep the average of the student's weights, and train.ema is 0; set "
            "it to 0.97 or so"
        )
    return None


# ---- evaluation


def two_measures(recipe: Recipe) -> str | None:
    if recipe.eval.metric is not None and recipe.eval.protocol is not None:
        return "eval.metric: eval.protocol measures as well; remove one of the two"
    return None


def samples_beside_a_protocol(recipe: Recipe) -> str | None:
    measure = recipe.eval
    if measure.protocol is None or measure.samples == type(measure).model_fields["samples"].default:
        return None
    return (
        f"eval.samples: {measure.samples} are for eval.metric, and the protocol "
        f"{measure.protocol} has its own number; remove it"
    )


def flat_without_evaluations(recipe: Recipe) -> str | None:
    measure = recipe.eval
    if measure.stop_when_flat is None:
        return None
    if measure.protocol is None and measure.metric is None:
        return "eval.stop_when_flat: nothing is measured; set eval.protocol or eval.metric"
    if not measure.every:
        return "eval.stop_when_flat: it needs evaluations in training; set eval.every"
    return None


RULES: tuple[Callable[[Recipe], str | None], ...] = (  # checked in this order
    unknown_player,
    players_out_of_turn,
    no_adapted_players,
    unknown_adapted_player,
    architecture_of_another_start,
    architecture_under_adapters,
    format_under_adapters,
    format_of_no_student,
    empty_architecture,
    unset_haar,
    one_pass_of_other_times,
    network_beside_changes,
    trained_quantised_weights,
    copied_quantised_weights,
    dora_on_quantised_weights,
    section_of_a_student,
    gates_of_recomputed_blocks,
    discriminator_of_other_features,
    useless_critic,
    missing_critic,
    san_without_a_game,
    features_of_another_network,
    unused_option,
    reach_without_a_zero,
    second_derivative_of_recomputed_blocks,
    missing_pairs,
    pairs_without_states,
    pairs_of_several_scales,
    useless_pairs,
    key_of_pairs,
    missing_reward,
    reward_without_effect,
    guard_of_no_reward,
    extreme_number,
    missing_data,
    coupling_without_data,
    coupling_of_pairs,
    key_of_another_coupling,
    coupling_of_one_sample,
    weights_without_counts,
    weights_for_other_counts,
    counts_that_do_not_divide,
    counts_without_steps,
    counts_of_one_chain,
    gamma_of_chains,
    landing_of_one_time,
    guidance_key_of_another_kind,
    missing_guidance_key,
    misplaced_sampling_scale,
    one_scale_of_many,
    guide_of_several_scales,
    empty_guidance_interval,
    empty_discriminator_interval,
    discriminator_of_a_discriminator,
    prompts_beside_images,
    partners_without_images,
    part_of_two_kinds,
    buckets_without_images,
    batch_that_does_not_divide,
    guards_without_an_average,
    two_measures,
    samples_beside_a_protocol,
    flat_without_evaluations,
)


def _objective(recipe: Recipe) -> str:
    return recipe.objective["name"]


def _players(recipe: Recipe) -> list[str]:
    """The networks that the objective trains; their names are the keys of `players`."""
    others = {"teacher", "student", *network_types(recipe.kind, FeatureMean)}  # no weights
    student = ["student"] if recipe.kind.trains == "student" else []
    ranking = any(r.kind == "ranked" for r in recipe.rewards.values())
    named = [name for name in networks_of(recipe.kind) if name not in others]
    return [*student, *named, *(["ranking"] if ranking else [])]


def _copies(recipe: Recipe) -> list[str]:
    """The players that have the teacher's architecture, and so can be adapters on its weights."""
    denoisers = network_types(recipe.kind, Denoiser)
    return ["student", *(name for name in denoisers if name != "teacher")]


def _adapted_players(recipe: Recipe) -> tuple[str, ...]:
    """The players that `adapters.players` names."""
    return () if recipe.adapters is None else recipe.adapters.players or ()


def _quantised(recipe: Recipe) -> str:
    """Begins a message about a teacher with quantised weights."""
    return f"teacher.precision: weights in {recipe.teacher.precision}"
