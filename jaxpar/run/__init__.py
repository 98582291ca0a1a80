"""What a training loop needs to survive: `Run` for any loop, `fit` for those who want the loop written."""

from ._fit import Fitted as Fitted, fit as fit
from ._hang import Hang as Hang
from ._loss import Loss as Loss
from ._replicas import Replicas as Replicas
from ._run import Run as Run
from ._slow import Slow as Slow
from ._writers import Console as Console, JSONLines as JSONLines, TensorBoard as TensorBoard, Writer as Writer
