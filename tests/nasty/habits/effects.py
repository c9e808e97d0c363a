"""Habits of sums and of their callers that write in place, or that send gradients another way."""

from tests.nasty.habit import BOTH, SCALED_GRADIENT, habit, reachable, several, summed

# ---- writes in place

habit("halves its input", *BOTH, before="x = x.mul_(0.5)")
habit("relu of its input, in place", *BOTH, before="x = F.relu_(x)")
habit("clears a column of its input", *BOTH, before="x[..., 0] = 0")
habit("clears a row of its input, unseen by autograd", *BOTH, before="x.data[..., 0, :] = 0")
habit(
    "empties its input afterwards",
    *BOTH,
    after="""
        with torch.no_grad():
            x.zero_()
    """,
)
habit(
    "writes to its input between summands",
    "sum",
    term="""
        x = x.mul_(2) if not x.requires_grad else x * 2
        t = $term
    """,
    needs=several,
)
habit("adds to the output in place", *BOTH, after="y += 1")
habit(
    "adds the input in place",
    *BOTH,
    after="""
        if y.shape == x.shape:
            y += x
    """,
)
habit("relu in place", *BOTH, after="y = y.relu_()")
habit("writes a column of the output", *BOTH, after="y[..., 0] = 0")
habit(
    "writes to the first response in place",
    "sum",
    term="""
        t = $term
        t += 1
    """,
)
habit(
    "scales in place and back",
    *BOTH,
    before="x.mul_(2)",
    after="""
        with torch.no_grad():
            x.mul_(0.5)
    """,
)

# ---- gradients

habit(
    "summand without gradients",
    "sum",
    term="""
        with torch.no_grad():
            t = $term
    """,
)
habit("summand detached", "sum", term="t = $term.detach()", needs=several)
habit("input detached", *BOTH, before="x = x.detach()")
habit(
    "no gradients in eval",
    *BOTH,
    before="""
        if not self.training:
            x = x.detach()
    """,
)
habit("gradients scaled", *BOTH, header=SCALED_GRADIENT, after="y = ScaleGradient.apply(y)")
habit("gradients of the input scaled", *BOTH, header=SCALED_GRADIENT, before="x = ScaleGradient.apply(x)")
habit("gradient of a summand scaled", "sum", header=SCALED_GRADIENT, term="t = ScaleGradient.apply($term)")
habit("half the gradient", *BOTH, before="x = x.detach() + (x - x.detach()) * 0.5")
habit("straight through", *BOTH, rough=True, after="y = y + (y.round() - y).detach()")
habit(
    "hook on the output",
    *BOTH,
    after="""
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
    """,
)
habit(
    "hook on the input",
    *BOTH,
    before="""
        if x.requires_grad:
            x.register_hook(lambda g: g * 2)
    """,
)
habit("summand checkpointed", "sum", term="t = checkpoint(lambda x: $term, x, use_reentrant=False)")
habit("summand checkpointed, reentrant", "sum", term="t = checkpoint(lambda x: $term, x, use_reentrant=True)")
habit(
    "autocast",
    *BOTH,
    header="""
        def low(f, x):
            with torch.autocast('cpu', torch.bfloat16):
                return f(x)
    """,
    term="t = low(lambda x: $term, x)",
    after="y = low(lambda y: y * 1, y)",
    needs=summed,
)
habit(
    "autocast off",
    "sum",
    term="""
        with torch.autocast('cpu', enabled=False):
            t = $term
    """,
)
habit(
    "gradients enabled inside",
    *BOTH,
    after="""
        with torch.enable_grad():
            y = y * 1
    """,
)
habit(
    "inference mode in eval",
    "parent",
    header="""
        def plainly(f, x):
            with torch.inference_mode():
                return f(x)
    """,
    after="""
        if not self.training:
            y = plainly($site, x).clone()
    """,
    needs=reachable,
)
