import subprocess
import sys


def test_names_are_known_without_heavy_imports():
    code = (
        "import sys\n"
        "from ooc_ntk.inputs.zoo.names import is_model_name, model_names\n"
        "assert is_model_name('resnet18,classes=10') and len(model_names()) == 25\n"
        "assert not {'torch', 'numpy', 'torchvision', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
