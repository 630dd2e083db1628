"""Packaging. Everything is plain setuptools, except one file: `swift_fastmtp_autoload.pth` goes next to the package,
in wheels and in editable installs, so that stock `swift` finds the plugin (see `swift_plugin/autoload.py`)."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
PTH = "swift_fastmtp_autoload.pth"


class BuildPy(build_py):
    """Puts the .pth at the root of the built library, which is where site-packages is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(str(ROOT / PTH), str(Path(self.build_lib) / PTH))

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PTH)]


class EditableWheel(editable_wheel):
    """Adds the .pth to the editable wheel, whichever way setuptools chose to link the sources."""

    def _select_strategy(self, *args, **kwargs):
        strategy = super()._select_strategy(*args, **kwargs)

        class WithPth(type(strategy)):
            def __call__(self, wheel, files, mapping):
                super().__call__(wheel, files, mapping)
                wheel.writestr(PTH, (ROOT / PTH).read_text())

        strategy.__class__ = WithPth
        return strategy


train = ["ms-swift>=4.6,<4.7", "peft>=0.17", "accelerate>=1.10", "tensorboard"]
deepspeed = ["deepspeed>=0.16"]
setup(
    name="swift_fastmtp",
    version="0.1.0",
    description="FastMTP for stock ms-swift and stock SGLang: train, export and measure MTP draft heads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["swift_fastmtp*"]),
    # Folders without __init__.py: a plugin file's, and data.
    package_data={"swift_fastmtp": ["swift_plugin/plugin/*.py", "data/tasks/*"]},
    install_requires=[
        "torch>=2.7",
        "transformers>=5.0",
        "safetensors>=0.5",
        "numpy>=2.0",
        "tqdm",
        "matplotlib",
        "openai>=2",
        "httpx",
        "huggingface_hub",
        "tenacity>=9",
        "pyarrow",
        "py3langid>=0.4",
        "pyyaml",
        "regex",
    ],
    extras_require={
        "train": train,
        "deepspeed": deepspeed,
        "flash": ["flash-attn>=2.8"],
        "serve": ["sglang>=0.5.19"],
        "dev": [
            *train,
            *deepspeed,
            "setuptools>=77",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "triton; platform_system == 'Linux'",
        ],
    },
    entry_points={
        "console_scripts": ["fastmtp=swift_fastmtp.cli:main"],
        "sglang.srt.plugins": ["swift_fastmtp=swift_fastmtp.serving.sglang_plugin:register"],
    },
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
)
