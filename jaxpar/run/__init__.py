"""What a training loop needs to survive: `Run` for any loop, `fit` for those who want the loop written."""

from ._fit import Fitted as Fitted, fit as fit
from ._run import Run as Run
from ._writers import Console as Console, JSONLines as JSONLines, TensorBoard as TensorBoard, Writer as Writer
