"""Packaging. Everything is plain setuptools, except two files that go next to the package, in wheels and in editable
installs, so that stock `swift` finds the plugin (see `swift_plugin/autoload.py`): `swift_fastmtp_autoload.pth`, and
`swift_fastmtp_autoload.start`, which Python reads in its place from 3.15 on (PEP 829).

Libraries of which the package uses private names are capped at what these were tried with: docs/compatibility.md."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
HOOKS = ("swift_fastmtp_autoload.pth", "swift_fastmtp_autoload.start")


class BuildPy(build_py):
    """Puts the hooks at the root of the built library, which is where site-packages is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in HOOKS:
                self.copy_file(str(ROOT / name), str(Path(self.build_lib) / name))

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib) / name) for name in HOOKS)]


class EditableWheel(editable_wheel):
    """Adds the hooks to the editable wheel, whichever way setuptools chose to link the sources."""

    def _select_strategy(self, *args, **kwargs):
        strategy = super()._select_strategy(*args, **kwargs)

        class WithHooks(type(strategy)):
            def __call__(self, wheel, files, mapping):
                super().__call__(wheel, files, mapping)
                for name in HOOKS:
                    wheel.writestr(name, (ROOT / name).read_text())

        strategy.__class__ = WithHooks
        return strategy


train = ["ms-swift>=4.6,<4.7", "peft>=0.17,<0.21", "accelerate>=1.10,<1.16", "datasets>=4,<4.9", "tensorboard"]
deepspeed = ["deepspeed>=0.16,<0.20"]
docs = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1"]
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
    package_data={"swift_fastmtp": ["swift_plugin/plugin/*.py", "bench/*.json*", "data/tasks/*", "*/templates/*.j2"]},
    install_requires=[
        "torch>=2.7,<2.14",
        "transformers>=5.0,<5.20",
        "safetensors>=0.5",
        "numpy>=2.0",
        "tqdm",
        "tabulate[widechars]>=0.9",
        "jinja2>=3.1",
        "matplotlib",
        "openai>=2",
        "httpx",
        "huggingface_hub",
        "tenacity>=9",
        "pyarrow",
        "py3langid>=0.4",
        "pydantic>=2.10,<3",
        "pyyaml",
        "regex",
    ],
    extras_require={
        "train": train,
        "deepspeed": deepspeed,
        "flash": ["flash-attn>=2.8"],
        "serve": ["sglang>=0.5.19,<0.5.24"],
        "vllm": ["vllm>=0.32,<0.33"],
        "docs": docs,
        "dev": [
            *train,
            *deepspeed,
            *docs,
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
        "vllm.general_plugins": ["swift_fastmtp=swift_fastmtp.serving.vllm_plugin:register"],
    },
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
)
