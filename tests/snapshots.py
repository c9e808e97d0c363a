"""That a model is as it was, or equals another: when it is only read, fails to be converted, or comes back."""

import torch


def snapshot(model):
    """Everything that a conversion could change: tree, objects, modes, tensors (bits and addresses)."""
    return {
        "tree": [
            (path, id(module), type(module), module.training)
            for path, module in model.named_modules(remove_duplicate=False)
        ],
        "state": {
            name: (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.detach().clone())
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        },
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["tree"] == before["tree"]
    assert after["attributes"] == before["attributes"]
    assert after["state"].keys() == before["state"].keys()
    for name, (*facts, tensor) in after["state"].items():
        *facts_before, tensor_before = before["state"][name]
        assert facts == facts_before, name
        assert torch.equal(tensor, tensor_before), name


def assert_same_model(model, expected):
    """Classes, names, their order, modes, what is trained, and every tensor: bits, dtype, strides."""
    assert repr(model) == repr(expected)
    trees = ([(p, type(m), m.training) for p, m in x.named_modules(remove_duplicate=False)] for x in (model, expected))
    assert next(trees) == next(trees)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in expected.named_parameters()
    ]
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert_same_tensor(state[name], tensor, name)


def assert_same_tensor(got, expected, name=""):
    facts = [(x.dtype, x.device, x.shape, x.stride()) for x in (got, expected)]
    assert facts[0] == facts[1], name
    assert torch.equal(got, expected), name
