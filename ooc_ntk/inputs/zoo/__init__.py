"""Models by name: built-in networks, those of torchvision and timm, and the forms that other NTK projects use.

:mod:`ooc_ntk.inputs.zoo.names` knows the names and imports nothing heavy; :mod:`ooc_ntk.inputs.zoo.build` builds.
"""
