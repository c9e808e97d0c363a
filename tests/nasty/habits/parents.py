"""Habits of modules that reach into the site that they call."""

from tests.nasty.habit import bare, habit, reachable, summed

# ---- reading

habit("reads the weight", "parent", after="y = y + $conv.weight.mean()")
habit("reads the weight without gradients", "parent", after="y = y / (1 + $conv.weight.detach().abs().sum())")
habit(
    "reads the bias",
    "parent",
    after="""
        if $conv.bias is not None:
            y = y + $conv.bias.sum()
    """,
)
habit("reads the shape of the weight", "parent", after="y = y / $conv.weight.shape[-1]")
habit("reads the dtype of the weight", "parent", before="x = x.to($conv.weight.dtype)")
habit(
    "reads the padding",
    "parent",
    after="y = y * (2 if $conv.padding in ('same', 'valid') else 1 + $conv.padding[0])",
    needs=reachable,
)
habit(
    "reads the geometry",
    "parent",
    after="y = y * ($conv.kernel_size[0] + $conv.stride[0] + $conv.dilation[0] + $conv.groups + $conv.in_channels)",
    needs=reachable,
)
habit("reads padding_mode and repr", "parent", after="y = y * len($conv.padding_mode)", needs=reachable)
habit("reads whether the weight wants gradients", "parent", after="y = y * 2 if $conv.weight.requires_grad else y")
habit("reads the weight as a Parameter", "parent", after="y = y * 2 if isinstance($conv.weight, nn.Parameter) else y")
habit(
    "asks for nn.Conv2d",
    "parent",
    after="y = y * 2 if isinstance($conv, nn.Conv2d) else y",
    needs=reachable,
    told="isinstance",
)
habit(
    "convolves by itself",
    "parent",
    after="y = y + F.conv2d(x, $conv.weight, $conv.bias, $conv.stride, $conv.padding, $conv.dilation, $conv.groups)",
    needs=reachable,
)
habit(
    "convolves by itself, in training only",
    "parent",
    after="""
        if self.training:
            y = F.conv2d(x, $conv.weight, $conv.bias, $conv.stride, $conv.padding, $conv.dilation, $conv.groups)
    """,
    needs=bare,
)
habit(
    "calls _conv_forward",
    "parent",
    after="y = y + $conv._conv_forward(x, $conv.weight, $conv.bias)",
    needs=reachable,
)
habit("calls forward instead", "parent", after="y = y + $site.forward(x)")
habit("calls nn.Conv2d.forward", "parent", after="y = y + nn.Conv2d.forward($conv, x)", needs=reachable)
habit("calls a part from outside", "parent", after="y = y + $conv(x)", needs=summed)
habit("calls a method of the site", "parent", after="y = y + $site.large(x)", needs=summed)
habit("reads an attribute of the site", "parent", after="y = y * getattr($site, 'factor', 1)")
habit(
    "iterates over the site's children",
    "parent",
    after="""
        for part in $site.children():
            if hasattr(part, 'kernel_size'):
                y = y + part.weight.sum()
    """,
    needs=summed,
)
habit("counts the site's parts", "parent", after="y = y * len(list($site.children()))", needs=summed)
habit(
    "penalises all weights", "parent", after="y = y + sum(p.square().sum() for p in $site.parameters())", merges=False
)
habit(
    "takes a gradient inside",
    "parent",
    after="""
        if torch.is_grad_enabled() and $conv.weight.requires_grad:
            y = y + torch.autograd.grad(y.sum(), $conv.weight, retain_graph=True)[0].mean()
    """,
)
habit(
    "functional_call",
    "parent",
    after="y = y + torch.func.functional_call($conv, {'weight': $conv.weight * 0.5}, (x,))",
    needs=reachable,
)

# ---- writing

habit("clamps the weight", "parent", before="$conv.weight.data.clamp_(-0.1, 0.1)")
habit(
    "clamps the weight in training",
    "parent",
    before="""
        if self.training:
            with torch.no_grad():
                $conv.weight.clamp_(-0.1, 0.1)
    """,
)
habit(
    "decays the weight",
    "parent",
    before="""
        with torch.no_grad():
            $conv.weight.mul_(0.9)
    """,
)
habit(
    "decays every parameter",
    "parent",
    before="""
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.9)
    """,
)
habit("renormalises the weight", "parent", before="$conv.weight.data = $conv.weight.data.renorm(2, 0, 0.5)")
habit("copies into the weight", "parent", before="$conv.weight.data.copy_($conv.weight.data.flip(-1))")
habit(
    "writes an element of the weight",
    "parent",
    before="""
        with torch.no_grad():
            $conv.weight[0, 0, 0, 0] = 3.0
    """,
)
habit(
    "initialises at the first call",
    "parent",
    init="self.ready = False",
    before="""
        if not self.ready:
            nn.init.constant_($conv.weight, 0.05)
            self.ready = True
    """,
)
habit(
    "zeroes the bias",
    "parent",
    before="""
        if $conv.bias is not None:
            nn.init.zeros_($conv.bias)
    """,
)
habit(
    "sets a new Parameter",
    "parent",
    init="self.ready = False",
    before="""
        if not self.ready:
            $conv.weight = nn.Parameter($conv.weight.detach() * 0.5)
            self.ready = True
    """,
)
habit(
    "sets the padding",
    "parent",
    before="$conv.padding = (0, 0)",
    needs=lambda block: bare(block) and block.convolution.padding != (0, 0),
)
habit("sets the stride", "parent", before="$conv.stride = (2, 2)", needs=bare)
habit("sets a flag of the convolution", "parent", before="$conv.loud = x.shape[-1] > 14", needs=reachable)
habit("freezes the weight in eval", "parent", before="$conv.weight.requires_grad_(self.training)")
habit(
    "exchanges the site",
    "parent",
    before="""
        if x.shape[-1] > 14:
            self.site = self.spare
    """,
    init="self.spare = nn.Identity()",
    needs=lambda block: block.keeps_shape,
)
habit("holds the weight", "parent", init="self.held = [$conv.weight]", after="y = y + self.held[0].mean()")
habit(
    "holds the weight as its own parameter",
    "parent",
    init="self.shared = $conv.weight",
    after="y = y + self.shared.mean()",
)
habit(
    "holds the convolution in a list",
    "parent",
    init="self.held = [$conv]",
    after="y = y + self.held[0](x)",
    needs=reachable,
)
habit("holds a bound method", "parent", init="self.held = $site.forward", after="y = self.held(x)")
