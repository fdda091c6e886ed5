"""PLACE: pathological-level alignment and correlation exploration for chest radiographs and their reports."""

from pathlib import Path as _Path

from place.registration import install as _install

__version__ = "0.1.0"

# `cluster/` and `kernels/` stand at the top of the checkout and are packaged as place.cluster and place.kernels. Run
# uninstalled (`ray job submit --working-dir .`), they are found through the checkout itself.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "cluster" / "launch.py").is_file() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))

_install()
