"""What a training loop needs to survive: `Run` for any loop, `fit` with the loop written, `launch`, `status`."""

from ._events import Event as Event, Events as Events, read as read
from ._fit import Fitted as Fitted, fit as fit
from ._hang import Hang as Hang
from ._launch import Launch as Launch, launch as launch
from ._loss import Loss as Loss
from ._replicas import Replicas as Replicas
from ._run import Run as Run
from ._slow import Slow as Slow
from ._status import Status as Status, status as status
from ._writers import Console as Console, JSONLines as JSONLines, TensorBoard as TensorBoard, Writer as Writer
