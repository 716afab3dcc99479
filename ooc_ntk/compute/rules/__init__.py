"""Layer rules: how a layer's per-sample gradients follow from its inputs and the gradients of its outputs."""
