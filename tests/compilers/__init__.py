"""torch.compile, torch.export, AOTInductor, ONNX, torch.fx: what other compilers make of the operators and layers."""
