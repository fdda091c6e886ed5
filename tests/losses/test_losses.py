"""Each term against a plain computation, and on two ranks against one process on the joined batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from place.kernels import contrast
from place.kernels.patch_correlation import patch_corr_loss
from spawn import run_ranks
from tiny import VOCAB, build_batch, build_tiny_config

from place.batch import Batch, Outputs
from place.config import TokenLossConfig
from place.distributed import mean_over_ranks, read_world
from place.losses.instance import instance_loss
from place.losses.objective import compute_losses
from place.losses.pathology import PAIRINGS, pathology_loss
from place.losses.search import search_loss
from place.losses.tokens import token_loss
from place.model.place import build_model

SCALE = torch.tensor(5.0)
TERMS = ("instance", "pathology", "correlation", "tokens")
CONTRASTS = ("instance", "pathology", "search")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_identical_reports_share_the_target_uniformly() -> None:
    image, text = unit(4, 6), unit(4, 6, seed=1)
    groups = torch.tensor([7, 3, 7, 9])
    expected = []
    for a, b in ((image, text), (text, image)):
        log_p = (SCALE * a @ b.T).log_softmax(1)
        expected += [-(log_p[0, 0] + log_p[0, 2]) / 2, -log_p[1, 1], -(log_p[2, 0] + log_p[2, 2]) / 2, -log_p[3, 3]]
    torch.testing.assert_close(instance_loss(image, text, SCALE, groups), torch.stack(expected).mean())


def test_without_multi_positive_a_pair_is_its_only_positive() -> None:
    image, text = unit(4, 6), unit(4, 6, seed=1)
    logits = SCALE * image @ text.T
    target = torch.arange(4)
    expected = sum(torch.nn.functional.cross_entropy(side, target) for side in (logits, logits.T)) / 2
    torch.testing.assert_close(instance_loss(image, text, SCALE, torch.ones(4, dtype=torch.long), False), expected)


def plain_pathology(visual, textual, study, hashes, scale, negatives: str) -> torch.Tensor:
    """The contrast over a list of pairs, anchor by anchor."""
    total = torch.zeros((), dtype=visual.dtype)
    for anchor, other in ((visual, textual), (textual, visual)):
        for i in range(len(anchor)):
            keep = [
                j
                for j in range(len(other))
                if j == i or (hashes[i] != hashes[j] and (negatives != "study" or study[i] == study[j]))
            ]
            logits = scale * other[keep] @ anchor[i]
            total = total - logits.log_softmax(0)[keep.index(i)]
    return total / 2 / len(visual)


def pair_by_hand(pairing: str, observations: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
    """The V-POR of each sentence of one study."""
    cosine = sentences @ observations.T
    if pairing == "soft":
        mixed = torch.stack([sum(share * v for share, v in zip(row.softmax(0), observations)) for row in 5.0 * cosine])
        return mixed / mixed.norm(dim=1, keepdim=True)
    if pairing == "max":
        return torch.stack([max(observations, key=lambda v, t=t: (v @ t).item()) for t in sentences])
    rows = cosine.tolist()
    choices = itertools.permutations(range(len(observations)), len(sentences))
    best = max(choices, key=lambda choice: sum(row[column] for row, column in zip(rows, choice)))
    return observations[list(best)]


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("negatives", ["study", "rank", "global"])
@pytest.mark.parametrize("mask_equal", [True, False])
def test_pathology_equals_a_loop_over_pairs(pairing: str, negatives: str, mask_equal: bool) -> None:
    observations, sentences = unit(3, 5, 6).requires_grad_(), unit(3, 4, 6, seed=1).requires_grad_()
    scale = SCALE.clone().requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    hashes = torch.tensor([[11, 12, 13, 0], [12, 0, 0, 0], [14, 15, 0, 0]])
    masked = torch.arange(12).view(3, 4) if not mask_equal else hashes
    matched = torch.cat([pair_by_hand(pairing, observations[i], sentences[i][mask[i]]) for i in range(3)])
    study = torch.arange(3)[:, None].expand(3, 4)
    expected = plain_pathology(matched, sentences[mask], study[mask], masked[mask], scale, negatives)
    given = observations, sentences, mask, hashes, scale
    ours = pathology_loss(*given, pairing, negatives, mask_equal=mask_equal)
    torch.testing.assert_close(ours, expected)
    # How a sentence chooses does not teach the temperature, which the contrast does.
    leaves = observations, sentences, scale
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))


def test_the_search_equals_a_loop_over_sentences_and_images() -> None:
    observations, sentences = unit(3, 5, 6), unit(3, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    hashes = torch.tensor([[11, 12, 13, 0], [12, 0, 0, 0], [14, 15, 0, 0]])
    real = [(study, place) for study in range(3) for place in range(4) if mask[study, place]]

    def score(sentence: tuple[int, int], image: int) -> float:
        return float(SCALE * (observations[image] @ sentences[sentence]).max())

    def has(image: int, sentence: tuple[int, int]) -> bool:
        return any(hashes[other] == hashes[sentence] for other in real if other[0] == image)

    expected = 0.0
    for own in real:
        images = [score(own, image) for image in range(3) if not has(image, own)]
        others = [score(other, own[0]) for other in real if not has(own[0], other)]
        for rivals in (images, others):
            mine = score(own, own[0])
            expected += math.log(math.exp(mine) + sum(map(math.exp, rivals))) - mine
    found = search_loss(observations, sentences, mask, hashes, SCALE)
    assert found.item() == pytest.approx(expected / 2 / len(real), rel=1e-12)


def test_observations_that_do_not_see_their_image_pass_the_contrast_of_pairs_but_not_the_search() -> None:
    """The same V-PORs in every image, one a sentence: each sentence finds itself, whatever the image shows."""
    sentences, scale = torch.eye(8, dtype=torch.float64).view(4, 2, 8), torch.tensor(30.0)
    observations = sentences.view(1, 8, 8).expand(4, 8, 8)
    given = observations, sentences, torch.ones(4, 2, dtype=torch.bool), torch.arange(1, 9).view(4, 2), scale
    assert pathology_loss(*given).item() < 1e-6
    assert search_loss(*given).item() == pytest.approx((math.log(4) + math.log(7)) / 2, rel=1e-6)


def test_token_wise_alignment_equals_a_loop_over_words() -> None:
    regions, words, groups = unit(3, 5, 6), unit(3, 4, 6, seed=1), torch.tensor([7, 3, 7])
    is_word = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    config = TokenLossConfig(attention_scale=4, word_scale=5, logit_scale=10)
    score = torch.zeros(3, 3, dtype=torch.float64)
    for image, report in ((i, j) for i in range(3) for j in range(3)):
        total = 0.0
        for word in words[report][is_word[report]]:
            found = (4 * regions[image] @ word).softmax(0) @ regions[image]
            total += torch.exp(5 * torch.cosine_similarity(found, word, dim=0)).item()
        score[image, report] = math.log(total) / 5 if total else 0.0
    expected = 0.0
    for logits in (10 * score, 10 * score.T):
        log_p = logits.log_softmax(1)
        expected -= ((log_p[0, 0] + log_p[0, 2]) / 2 + log_p[1, 1] + (log_p[2, 0] + log_p[2, 2]) / 2).item() / 6
    assert token_loss(regions, words, is_word, groups, config).item() == pytest.approx(expected, rel=1e-12)


def test_equal_sentences_are_never_negatives() -> None:
    observations, sentences = unit(2, 3, 6), unit(2, 1, 6, seed=1)
    given = observations, sentences, torch.ones(2, 1).bool(), torch.tensor([[5], [5]]), SCALE
    assert pathology_loss(*given).item() == pytest.approx(0, abs=1e-9)
    assert search_loss(*given).item() == 0


@pytest.mark.parametrize("term", [pathology_loss, search_loss])
def test_a_batch_without_sentences_costs_nothing_and_has_a_gradient(term: Callable[..., torch.Tensor]) -> None:
    observations = unit(2, 3, 6).requires_grad_()
    loss = term(observations, unit(2, 4, 6), torch.zeros(2, 4).bool(), torch.zeros(2, 4).long(), SCALE)
    loss.backward()
    assert loss.item() == 0
    assert observations.grad is not None
    assert not observations.grad.any()


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("negatives", ["study", "rank", "global"])
def test_the_loss_never_waits_for_the_device(pairing: str, negatives: str) -> None:
    """On the meta device there are no values: a copy to the host, an item or a nonzero fails."""
    with torch.device("meta"):
        observations, sentences = torch.rand(4, 6, 8, requires_grad=True), torch.rand(4, 5, 8, requires_grad=True)
        scale, mask = torch.ones((), requires_grad=True), torch.ones(4, 5, dtype=torch.bool)
        hashes, groups = torch.ones(4, 5, dtype=torch.long), torch.ones(4, dtype=torch.long)
    given = observations, sentences, mask, hashes, scale
    loss = pathology_loss(*given, pairing, negatives, num_sentences=20) + search_loss(*given)
    (loss + instance_loss(observations[:, 0], sentences[:, 0], scale, groups)).backward()
    assert scale.grad is not None
    for asked in (lambda: loss.item(), lambda: mask.nonzero(), lambda: loss.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            asked()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_device_that_is_not_asked_for_its_rows_gives_the_same_loss(pairing: str) -> None:
    observations, sentences = unit(3, 2, 6).requires_grad_(), unit(3, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    arguments = (observations, sentences, mask, torch.arange(12).view(3, 4) * mask, SCALE, pairing)
    counted, told = pathology_loss(*arguments), pathology_loss(*arguments, num_sentences=6)
    torch.testing.assert_close(told, counted)
    torch.testing.assert_close(*(torch.autograd.grad(value, observations)[0] for value in (told, counted)))


def test_the_total_is_the_weighted_sum_and_a_term_of_weight_zero_is_left_out() -> None:
    weights = {"instance": {"weight": 2.0}, "pathology": {"weight": 0.0}, "correlation": {"weight": 0.5}}
    config = build_tiny_config(loss=weights)
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, torch.device("cpu"))
    losses = compute_losses(model(build_batch(4)), build_batch(4), config.loss, 1 / 255)
    assert losses.pathology.item() == 0
    torch.testing.assert_close(losses.total, 2 * losses.instance + 0.5 * losses.correlation)


OPTIONS = {
    "multi_positive": ("instance", {"instance": {"multi_positive": False}}),
    "pairing": ("pathology", {"pathology": {"pairing": "max"}}),
    "negatives": ("pathology", {"pathology": {"negatives": "study"}}),
    "search": ("pathology", {"pathology": {"search": 0.25}}),
    "mask_equal": ("pathology", {"pathology": {"mask_equal": False}}),
    "normalize": ("correlation", {"correlation": {"normalize": False}}),
    "distance": ("correlation", {"correlation": {"distance": "smooth_l1"}}),
    "beta": ("correlation", {"correlation": {"distance": "smooth_l1", "beta": 0.03}}),
    "scales": ("tokens", {"tokens": {"attention_scale": 2.0, "word_scale": 3.0, "logit_scale": 7.0}}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_the_config_is_that_of_its_loss(name: str) -> None:
    term, change = OPTIONS[name]
    config = build_tiny_config(loss={**change, "tokens": {"weight": 1.0, **change.get("tokens", {})}}).loss
    plain_config = build_tiny_config(loss={"tokens": {"weight": 1.0}})
    torch.manual_seed(0)
    model, _ = build_model(plain_config, VOCAB, torch.device("cpu"))
    batch = build_batch(6)
    batch = batch._replace(report_group_B=torch.tensor([0, 0, 1, 2, 3, 3]))
    batch.image_BCYX[:, :, :8, :8] *= 0.01
    outputs = model(batch)._replace(logit_scales=torch.tensor([3.0, 9.0]))
    asked, grey = config.pathology, 0.05
    given = outputs.observations_BKE, outputs.sentences_BSE, outputs.mask_BS, batch.sentence_hash_BS, torch.tensor(9.0)
    pairs = pathology_loss(*given, asked.pairing, asked.negatives, mask_equal=asked.mask_equal)
    searched = search_loss(*given)
    sum_of_images, images = patch_corr_loss(
        *(outputs.z_BNE, outputs.target_BND),
        valid_BN=batch.valid_patch_BN,
        focus_BN=outputs.focus_BN,
        normalize=config.correlation.normalize,
        loss=config.correlation.distance,
        beta=config.correlation.beta,
        eps_y=grey,
        method="reference",
    )
    groups, is_word = batch.report_group_B, batch.sentence_of_token_BT >= 0
    expected = {
        "instance": instance_loss(*outputs[:2], torch.tensor(3.0), groups, config.instance.multi_positive),
        "pathology": (1 - asked.search) * pairs + asked.search * searched,
        "correlation": sum_of_images / images,
        "tokens": token_loss(outputs.regions_BNE, outputs.words_BTE, is_word, groups, config.tokens),
    }
    found, plain = (compute_losses(outputs, batch, c, grey)._asdict() for c in (config, plain_config.loss))
    for other, value in expected.items():
        torch.testing.assert_close(found[other], value, msg=other)
    assert abs(found[term] / plain[term] - 1) > 1e-3, "the option changes its term here"


def build_uneven_batch() -> Batch:
    """Twelve pairs for two or three ranks, which then have different numbers of sentences, patch pairs and tokens.

    The third of three ranks has no sentence at all.
    """
    batch = build_batch(12)
    batch.length_B[:6] = batch.length_B[:6].clamp(max=8)  # two sentences of three words
    batch.attention_BT[:6, 8:] = False
    batch.sentence_of_token_BT[:6, 7:] = -1
    batch.sentence_hash_BS[:6, 2:] = 0
    batch.valid_patch_BN[:5, 3:] = False
    batch.valid_patch_BN[0] = False
    batch.sentence_of_token_BT[8:] = -1
    batch.sentence_hash_BS[8:] = 0
    batch.num_sentences_B[:] = (batch.sentence_hash_BS != 0).sum(1)
    return batch


def cut_padding(batch: Batch) -> Batch:
    """As a rank gets it: no longer than its own longest report."""
    longest = int(batch.length_B.max())
    names = ("token_ids_BT", "attention_BT", "sentence_of_token_BT")
    return batch._replace(**{name: getattr(batch, name)[:, :longest] for name in names})


def run_term(name: str) -> dict[str, torch.Tensor]:
    """Loss of one term and its gradients by the model's parameters, averaged over ranks."""
    weights: dict[str, dict[str, float]] = {term: {"weight": float(term == name)} for term in TERMS}
    if name == "search":
        weights["pathology"] = {"weight": 1.0, "search": 0.5}
    config = build_tiny_config(loss=weights)
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, torch.device("cpu"))
    world = read_world()
    mine = cut_padding(build_uneven_batch().chunks(world.world)[world.rank])
    outputs: Outputs = model(mine)
    loss = compute_losses(outputs, mine, config.loss, 1 / 255).total
    loss.backward()
    gradients = {n: mean_over_ranks(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": mean_over_ranks(loss.detach()), **gradients}


def run_terms() -> dict[str, dict[str, torch.Tensor]]:
    """Each term in one piece, and the contrastive ones in tiles too."""
    results = {f"{name} plain": run_term(name) for name in (*TERMS, "search")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "TILED_FROM_PAIRS", 0)
        patch.setattr(contrast, "TILE_ROWS", 5)
        patch.setattr(contrast, "TILE_COLUMNS", 7)
        return results | {f"{name} tiled": run_term(name) for name in CONTRASTS}


@pytest.fixture(scope="module")
def single() -> dict:
    return run_terms()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return run_ranks(run_terms, request.param)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "run", [*(f"{name} plain" for name in (*TERMS, "search")), *(f"{name} tiled" for name in CONTRASTS)]
)
def test_ranks_have_the_loss_and_the_gradients_of_one_process(run: str, single: dict, ranks: list[dict]) -> None:
    expected = single[run.replace("tiled", "plain")]
    assert expected["loss"].item() > 0
    for rank in ranks:
        found = rank[run]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            atol = 1e-5 * float(value.abs().max() + 1e-3)
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=name)
