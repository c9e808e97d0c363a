"""Distillation brings a converted model closer to its original, in loops of any kind, and touches nothing else."""

import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert
from sw_transplant.sparsity import FilterSparsity
from sw_transplant.surgery.distill import Distiller, distill
from tests.sampling import sample
from tests.surgery.test_calibration import Net, distance, images


@pytest.fixture
def pair():
    torch.manual_seed(3)
    teacher = Net().eval()
    return convert(teacher, SWConfig(mode="shiftwise", tile=3, edges=2, ghost=0.25)), teacher


@pytest.mark.parametrize("form", sample(["tensor", "pair", "batches", "dicts"], ["pair", "dicts"], unpack=False))
def test_the_student_comes_closer_to_its_teacher(pair, form):
    student, teacher = pair
    x = images(64)
    labels = teacher(x).argmax(1)
    data = {
        "tensor": x,
        "pair": (x, labels),
        "batches": list(x.split(16)),
        "dicts": [{"pixel_values": part} for part in x.split(16)],
    }[form]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state, heard = torch.get_rng_state(), []
    start = distance(student(x), teacher(x))
    settings = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 16, "after_epoch": lambda *facts: heard.append(facts)}
    assert distill(student, teacher, data, **settings) is student
    assert distance(student(x), teacher(x)) < 0.95 * start
    assert [epoch for epoch, _ in heard] == list(range(1, 9))
    assert heard[-1][1] < heard[0][1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not student.training
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*student.modules(), *teacher.modules())
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_same_seed_gives_the_same_student(pair):
    student, teacher = pair
    twin = convert(teacher, SWConfig(mode="shiftwise", tile=3, edges=2, ghost=0.25))
    for each, grad in ((student, True), (twin, False)):
        with torch.set_grad_enabled(grad):
            distill(each, teacher, images(32), epochs=1, augment=lambda x: x + 0.1 * torch.randn_like(x))
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_batchnorms_keep_their_statistics_or_go_by_the_batch(pair):
    student, teacher = pair
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    weights = [norm.weight.clone() for norm in norms]
    settings = {"epochs": 2, "batch_size": 16, "after_epoch": lambda *_: student.train()}
    distill(student, teacher, images(32), batch_statistics=False, **settings)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert not any(torch.equal(norm.weight, weight) for norm, weight in zip(norms, weights, strict=True))
    assert not any(norm.training for norm in norms)
    distill(student, teacher, images(32), **settings)
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


def test_a_criterion_for_loops_of_ones_own(pair):
    student, teacher = pair
    x, labels = images(16), torch.arange(16) % 5
    distiller = Distiller(student, teacher, feature_weight=0.0, label_weight=2.0, temperature=2.0)
    student.train()
    output = student(x)
    loss = distiller(output, labels, num_items_in_batch=16)  # as the Trainer of transformers calls it
    mine, theirs = (each / 2 for each in (output, teacher(x)))
    kl = nn.functional.kl_div(mine.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, 4 * kl + 2 * nn.functional.cross_entropy(output, labels))
    with pytest.raises(ValueError, match="not called since the last loss"):
        distiller(output)
    student.eval()
    assert float(distiller(student(x), labels).detach()) > 0  # the Trainer evaluates, too
    distiller.detach()


def test_the_features_are_those_of_the_blocks(pair):
    student, teacher = pair
    distiller = Distiller(student, teacher)
    assert distiller.blocks == ["blocks.0", "blocks.1"]
    distiller.detach()
    x = images(16)
    student.train()
    distiller = Distiller(student, teacher, feature_weight=3.0)
    mine = student(x)
    with_features = distiller(mine)
    distiller.detach()
    losses, a, b = [], x, x
    with torch.no_grad():
        for i in range(2):
            a, b = student.blocks[i](a), teacher.blocks[i](b)
            losses.append(float((a - b).square().mean() / b.square().mean()))
        kl = nn.functional.kl_div(mine.log_softmax(1), teacher(x).softmax(1), reduction="batchmean")
    assert float(with_features.detach()) == pytest.approx(float(kl) + 3 * sum(losses) / 2, rel=1e-4)


def test_sparsity_follows_the_optimizer(pair):
    student, teacher = pair
    x = images(32)
    sparsity = FilterSparsity(student, 0.5, update_frequency=2)
    sparsity.initialise((x, teacher(x).argmax(1), nn.functional.cross_entropy))
    masks = [path.mask.clone() for path in student.blocks[0].large.paths]
    distill(student, teacher, x, epochs=4, batch_size=16, attach=[sparsity])
    assert sparsity.steps == 8
    used = [path.mask for path in student.blocks[0].large.paths]
    assert any(not torch.equal(a, b) for a, b in zip(masks, used, strict=True))
    assert 0.3 < float(torch.stack(used).float().mean()) < 0.85


def test_what_cannot_be_distilled_is_refused(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match="no converted layer"):
        distill(teacher, teacher, images(4))
    with pytest.raises(ValueError, match="data is empty"):
        distill(student, teacher, [])
    with pytest.raises(ValueError, match="gone through again"):
        distill(student, teacher, iter([images(4)]))
    with pytest.raises(ValueError, match=r"torch.uint8 \(4, 8, 9, 9\) for images"):
        distill(student, teacher, images(4).to(torch.uint8))
    with pytest.raises(ValueError, match="ndarray for images"):
        distill(student, teacher, [images(4).numpy()])
    with pytest.raises(ValueError, match="student and teacher are one model"):
        distill(student, student, images(4))
    with pytest.raises(ValueError, match="no parameter of the student requires gradients"):
        distill(convert(teacher).requires_grad_(False), teacher, images(4))
    with pytest.raises(ValueError, match="expected a finite one; give finite images"):
        distill(student, teacher, torch.full((4, 8, 9, 9), torch.nan))
    with pytest.raises(ValueError, match="or a lower learning_rate"):
        distill(student, teacher, images(32), learning_rate=1e30, epochs=20)
    assert not student.training
    with pytest.raises(ValueError, match="temperature 0"):
        Distiller(student, teacher, temperature=0)
