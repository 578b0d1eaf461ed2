"""export_torchscript: a model as one TorchScript file that was tried in a fresh process before it got its name.

Loading models by name, for the command, is in integrations/; torch.export and AOTInductor need no code of ours.
"""
