"""That a model is as it was: what may not change when it is only read, or when a conversion fails."""

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
