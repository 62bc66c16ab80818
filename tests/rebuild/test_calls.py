"""Which saved tensors are released, and that a network gives the bits that it gives without."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d, Renorm, freeze, functional, unfreeze

from .nets import Calls, Kept, Own, X, both, chain, gradients, outputs_of, same, settled, watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.GELU])
def test_sequential(dtype, layout, act):
    plain, saving = (m.to(dtype).to(memory_format=layout) for m in both(chain(act(), act(), act())))
    x = X.to(dtype).to(memory_format=layout)
    for _ in range(2):
        same(gradients(saving, x), gradients(plain, x))


OPTIONS = {
    "ghost": {"ghost_batch_size": 3},
    "renorm": {"renorm": Renorm(1.3, 0.2)},
    "skip": {"nonfinite": "skip"},
    "domains": {"domains": 2, "domain_affine": True},
    "accumulation": {"accumulation_steps": 2},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "no affine": {"affine": False},
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("axis", [1, -1], ids=["channels second", "channels last"])
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_options(option, axis, masked, mode):
    class Net(nn.Module):
        def __init__(self, save_memory):
            super().__init__()
            torch.manual_seed(0)
            given = {"feature_axis": axis, **OPTIONS.get(option, {})}
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.bn1 = BatchNormAct1d(5, "silu", save_memory=save_memory, **given)
            self.bn2 = BatchNormAct1d(5, "tanh", save_memory=save_memory, **given)

        def forward(self, x):
            mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
            first = self.first(x) if axis == -1 else self.first(x).transpose(1, 2)
            y = self.bn1(first, mask=mask)
            return self.bn2(self.second(y) if axis == -1 else self.second(y.transpose(1, 2)).transpose(1, 2), mask=mask)

    models = [Net(save) for save in (False, True)]
    x = torch.randn(8, 7, 5)
    for model in models:
        if mode == "eval":
            model.eval()
        elif mode == "frozen" and option != "untracked":
            freeze(model)
    for _ in range(3):
        same(gradients(models[1], x), gradients(models[0], x))
    with Calls() as calls:
        gradients(models[1], x)
    composed = mode == "train" and option == "renorm"  # whose forward runs `apply` too
    fixed = mode != "train" and option != "untracked"
    assert calls.rebuilt == (3 if composed or fixed else 1)


def test_domains_by_sample():
    models = []
    for save in (False, True):
        torch.manual_seed(0)
        models.append(nn.ModuleList([nn.Linear(5, 5), BatchNormAct1d(5, "relu", domains=2, save_memory=save)] * 2))
    domain = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])

    def call(model, x):
        for linear, norm in zip(model[::2], model[1::2], strict=True):
            x = norm(linear(x), domain=domain)
        return x

    same(*(gradients(m, torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), call) for m in models))


def test_synchronized(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, saving = both(chain(nn.ReLU(), nn.SiLU()), process_group="world")
        same(gradients(saving, X), gradients(plain, X))
        plain, saving = (nn.parallel.DistributedDataParallel(m) for m in both(chain(nn.ReLU(), nn.SiLU())))
        for _ in range(2):
            same(gradients(saving, X), gradients(plain, X))
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_of_an_output_is_kept_in_a_sequential_and_one_of_each_is_kept_without():
    for model, wanted in zip(both(chain(nn.SiLU(), nn.ReLU(), nn.Tanh())), (3, 0), strict=True):
        kept = outputs_of(model, nn.modules.conv._ConvNd)
        seen: list[Kept] = []
        for conv in list(model.children())[3::3]:
            conv.register_forward_pre_hook(lambda m, given, seen=seen: seen.append(watch(given[0])))
        out = model(X)
        assert sum(one.alive for one in seen) == wanted
        assert sum(one.alive for one in kept) == 4  # the inputs of the normalizations, and the network's output
        out.sum().backward()


@pytest.mark.parametrize("flat", ["view", "linear", "flatten"])
def test_views_of_an_output(flat):
    class Net(nn.Module):
        def __init__(self, save):
            super().__init__()
            torch.manual_seed(0)
            self.bn1 = BatchNormAct1d(4, "relu", save_memory=save)
            self.bn2 = BatchNormAct1d(6, "relu", save_memory=save)
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            y = self.bn1(x)
            seen.append(watch(y))
            if flat == "linear":
                return self.bn2(F.linear(y, self.weight).transpose(1, 2))
            y = y.flatten(0, 1) if flat == "flatten" else y.transpose(1, 2).reshape(-1, 6)[1:, :]
            return self.bn2(y @ self.weight)

    seen: list[Kept] = []
    x = torch.randn(5, 4, 6)
    same(*(gradients(Net(save), x) for save in (True, False)))
    if flat != "view":  # whose reshape copied
        seen.clear()
        out = Net(True)(x.requires_grad_())
        assert not seen[0].alive
        out.sum().backward()


def test_a_residual_s_sum_is_kept():
    torch.manual_seed(0)
    norm, conv, last = BatchNormAct2d(3, save_memory=True), nn.Conv2d(3, 3, 1), BatchNorm2d(3)
    last.save_memory = True
    x = X.clone().requires_grad_()
    y = norm(x, residual=X)
    kept, out = watch(y), None
    out = last(conv(y))
    del y
    assert kept.alive
    out.sum().backward()


def test_an_output_that_is_held_is_not_computed_again():
    plain, saving = both(Own(F.silu))
    held = []

    def call(model, x):
        model.act = lambda z: held.append(F.silu(z)) or held[-1]
        return model(x)

    want = gradients(plain, X, call)
    with Calls() as calls:
        same(gradients(saving, X, call), want)
    # silu asks for z, which nothing holds
    assert calls.names.count("aten::silu") == 1
    assert calls.rebuilt == 1


def test_once_for_all_who_ask_and_freed_at_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b, self.last = nn.BatchNorm2d(3), *(nn.Conv2d(3, 4, 3) for _ in range(2)), None
            self.last = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(x)
            return self.last(self.a(y) + self.b(y))

    plain, saving = both(Two())
    want = gradients(plain, X)
    with Calls() as calls:
        same(gradients(saving, X), want)
    assert calls.rebuilt == 1
    out = saving(X.clone().requires_grad_())
    asked = [node._raw_saved_input for node, _ in out.grad_fn.next_functions[0][0].next_functions]
    recipe = asked[0].data._recipe
    assert recipe.askers == 2
    out.sum().backward(retain_graph=True)
    assert recipe._shared is None
    with Calls() as calls:  # only one of the two asks: the end of the backward frees what waits for the other
        torch.autograd.grad(out.sum(), saving.a.weight, retain_graph=True)
    assert calls.rebuilt == 1
    assert recipe._shared is None


def test_the_input_is_freed_with_the_backward_though_the_loss_lives():
    _, saving = both(chain(nn.ReLU(), nn.GELU()))
    kept = outputs_of(saving, nn.modules.conv._ConvNd)
    loss = saving(X).sum()
    assert all(one.alive for one in kept[:2])
    loss.backward()
    assert not any(one.alive for one in kept[:2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["all", "part"])
def test_checkpointing(reentrant, inside):
    def call(model, x):
        if inside == "all":
            return checkpoint(model, x, use_reentrant=reentrant)
        first, middle, last = model[:3], model[3:6], model[6:]
        return last(checkpoint(middle, first(x), use_reentrant=reentrant))

    plain, saving = both(chain(nn.ReLU(), nn.GELU(), nn.SiLU()))
    for _ in range(2):
        same(gradients(saving, X, call), gradients(plain, X, call))


@pytest.mark.parametrize("hooks", ["offload", "other", "looking"])
@pytest.mark.parametrize("around", ["all", "part"])
def test_saved_tensor_hooks_of_others_decide(hooks, around):
    def context():
        if hooks == "offload":
            return torch.autograd.graph.save_on_cpu()
        if hooks == "looking":
            return torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t)
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(t.shape) or t.double(), lambda t: t.float()
        )

    def call(model, x):
        if around == "all":
            with context():
                return model(x)
        x = model[:3](x)
        with context():
            x = model[3:6](x)
        return model[6:](x)

    plain, saving = both(chain(nn.ReLU(), nn.GELU(), nn.SiLU()))
    seen: list[torch.Size] = []
    want, packed = gradients(plain, X, call), list(seen)
    seen.clear()
    same(gradients(saving, X, call), want)
    assert seen == packed


def test_a_hook_of_another_on_the_consumer_stays():
    _, saving = both(chain(nn.ReLU(), nn.GELU()))
    y = saving[:3](X)
    z = saving[3](y)
    z.grad_fn._raw_saved_input.register_hooks(lambda t: t * 1, lambda t: t)
    out = saving[4:](z)
    assert not hasattr(z.grad_fn._raw_saved_input.data, "tensor")
    out.sum().backward()


def test_the_layer_s_keyword_copies_pickles_and_shows():
    layer = BatchNormAct2d(4, "silu", save_memory=True)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.norm.save_memory
        assert "save_memory=True" in repr(other)
    assert not BatchNormAct2d(4).norm.save_memory
    assert "save_memory" not in repr(BatchNorm1d(3))
    assert layer.state_dict().keys() == BatchNormAct2d(4).state_dict().keys()


def test_with_in_place_it_takes_that_one_s_place():
    layer = BatchNormAct2d(3, "leaky_relu", save_memory=True, inplace=True)
    x = nn.Conv2d(3, 3, 1)(X)
    y = layer(x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_freezing_keeps_it():
    _, saving = both(chain(nn.ReLU(), nn.SiLU()))
    freeze(saving)
    assert all(m.save_memory for m in saving.modules() if isinstance(m, BatchNorm2d))
    unfreeze(saving)
    assert all(m.save_memory for m in saving.modules() if isinstance(m, BatchNorm2d))


def test_functional_calls_are_as_they_were():
    x = settled(nn.Sequential(nn.Conv2d(3, 4, 3)))(X)
    out = functional.batch_norm(x, None, None, training=True)
    assert not hasattr(out.grad_fn, "batchnorm_output")
