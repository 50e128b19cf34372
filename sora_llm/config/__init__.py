"""The config of a run: its keys, their allowed values, and how a YAML file and overrides become a `Config`.

    config = load_config("configs/llama7b.yaml", ["train.max_steps=100", "train.num_train_epochs=null"])

Nothing is corrected silently: an unknown key, a wrong type or an invalid combination is a `UserError` of a sentence or
two that states what was given and where, what is allowed, and what to do.  `running/unpack.py` turns sections of a
`Config` into plain arguments.

    schema       the sections and keys
    reading      from a file to a Config; it uses yaml_text, names (from elsewhere), conversion (types and ranges),
                 rules (valid combinations) and origin (where a key was stated)
    writing      from a Config to plain values and YAML
    resuming     what a resumed run may change
    from_elsewhere   from another trainer's keys to ours
"""

from sora_llm.config.from_elsewhere import translate as translate
from sora_llm.config.names import ALIASES as ALIASES
from sora_llm.config.names import NAMES_ELSEWHERE as NAMES_ELSEWHERE
from sora_llm.config.reading import from_dict as from_dict
from sora_llm.config.reading import load_config as load_config
from sora_llm.config.reading import read_mapping as read_mapping
from sora_llm.config.resuming import CHANGES_NO_ROW as CHANGES_NO_ROW
from sora_llm.config.resuming import resume_conflicts as resume_conflicts
from sora_llm.config.schema import Config as Config
from sora_llm.config.schema import Data as Data
from sora_llm.config.schema import Dataset as Dataset
from sora_llm.config.schema import Distributed as Distributed
from sora_llm.config.schema import Evaluation as Evaluation
from sora_llm.config.schema import Model as Model
from sora_llm.config.schema import Output as Output
from sora_llm.config.schema import Quantization as Quantization
from sora_llm.config.schema import Sora as Sora
from sora_llm.config.schema import Train as Train
from sora_llm.config.writing import differing_keys as differing_keys
from sora_llm.config.writing import flattened as flattened
from sora_llm.config.writing import recipe as recipe
from sora_llm.config.writing import to_dict as to_dict
from sora_llm.config.writing import to_yaml as to_yaml
from sora_llm.config.yaml_text import write_yaml as write_yaml
