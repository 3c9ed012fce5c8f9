from __future__ import annotations

import torch
import torch.nn.functional as F

from echo_rl.drafting.batches import collate, documents
from echo_rl.drafting.features import open_features
from echo_rl.drafting.loss import Columns, soft_cross_entropy, soft_labels
from echo_rl.drafting.train import Corpus, TrainingRun, batch_loss
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts


def test_gradients_equal_those_of_the_formula() -> None:
    torch.manual_seed(0)
    hidden, output = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    labels, weight, correction = torch.softmax(torch.randn(6, 9), -1), torch.rand(6), torch.randn(9)
    formula = (weight * F.cross_entropy(hidden @ output.T + correction, labels, reduction="none")).sum() * 3
    expected = torch.autograd.grad(formula, (hidden, output))
    loss = soft_cross_entropy(hidden, output, labels, weight, correction) * 3
    torch.testing.assert_close(loss, formula)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, output)), expected)


def test_labels_mix_distribution_and_argmax() -> None:
    final, output = torch.randn(4, 5), torch.randn(7, 5)
    logits = final @ output.T
    expected = 0.75 * torch.softmax(logits, -1) + 0.25 * F.one_hot(logits.argmax(-1), 7)
    torch.testing.assert_close(soft_labels(final, output, 0.25), expected)


def test_all_columns_are_exact_and_sampled_ones_are_unbiased() -> None:
    torch.manual_seed(1)
    labels = torch.softmax(torch.randn(3, 60) * 3, -1)
    everything = Columns.choose(labels, 60, torch.Generator())
    assert sorted(everything.ids.tolist()) == list(range(60)) and not everything.correction.any()
    torch.testing.assert_close(everything.restrict(labels), labels[:, everything.ids])
    mass = torch.rand(60)
    total = 0.0
    for seed in range(3000):
        columns = Columns.choose(labels, 30, torch.Generator().manual_seed(seed))
        assert torch.equal(columns.ids[columns.place[columns.ids]], columns.ids)
        total += float((mass[columns.ids] * columns.correction.exp()).sum()) / 3000
    assert abs(total / float(mass.sum()) - 1) < 0.01


def test_rows_without_a_sayable_label_have_no_gradient(world: TrainConfig, parts: TargetParts) -> None:
    """Change the target's opinion at masked labels only: neither loss nor gradient may move."""
    run = TrainingRun(world, parts)
    batch = collate(run.corpus.shards, run.corpus.training[:4])
    unsayable = torch.tensor([bool(run.corpus.to_draft[token] < 0) for token in batch.tokens.tolist()])
    assert unsayable.any()

    def outcome(final: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = type(batch)(**{**vars(batch), "final": final})
        config = TrainConfig(**{**vars(world), "columns": 36})
        loss = batch_loss(run.net, changed, parts.embedding, run.output, run.corpus, config, 0)
        return torch.autograd.grad(loss, [run.net.get_parameter("fc.weight"), run.net.get_parameter("lm_head.weight")])

    before = outcome(batch.final)
    masked = batch.final.clone()
    masked[:-1][unsayable[1:]] = 9.0  # positions whose next token is outside the draft vocabulary
    masked[batch.last] = 9.0  # nothing follows the last token
    first_rows = torch.tensor([int(index) for index in batch.rows if int(batch.positions[index]) < 3])
    assert not len(first_rows)
    masked[batch.positions < 3] = 9.0  # the prompt is not learnt
    for one, other in zip(before, outcome(masked), strict=True):
        torch.testing.assert_close(one, other)
    learnt = batch.final.clone()
    learnt[batch.rows[0] + 1] = 9.0
    assert any(not torch.equal(one, other) for one, other in zip(before, outcome(learnt), strict=True))


def test_corpus_keeps_validation_apart_and_greedy(world: TrainConfig) -> None:
    corpus = Corpus.open(world, 40)
    assert len(corpus.validation) == 4 and not set(corpus.validation) & set(corpus.training)
    assert len(corpus.training) + 4 == len(documents(open_features(world.data, world.features)))
    assert all(corpus.shards[item.shard].conversations.greedy[item.index] for item in corpus.validation)
