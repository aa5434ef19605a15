"""Quick measures of what a model can do: a paragraph, repeated tokens, indirect objects, MMLU, and
the loss on samples of well-known corpora.

Only the loaders of corpora and of MMLU need a network, and the ``datasets`` library.
"""

from hookedlm.evals.corpora import DATA_LOADERS as DATA_LOADERS
from hookedlm.evals.corpora import evaluate as evaluate
from hookedlm.evals.corpora import evaluate_on_dataset as evaluate_on_dataset
from hookedlm.evals.corpora import make_code_data_loader as make_code_data_loader
from hookedlm.evals.corpora import make_owt_data_loader as make_owt_data_loader
from hookedlm.evals.corpora import make_pile_data_loader as make_pile_data_loader
from hookedlm.evals.corpora import make_wiki_data_loader as make_wiki_data_loader
from hookedlm.evals.indirect_objects import IOIDataset as IOIDataset
from hookedlm.evals.indirect_objects import ioi_eval as ioi_eval
from hookedlm.evals.mmlu import make_mmlu_data_loader as make_mmlu_data_loader
from hookedlm.evals.mmlu import mmlu_eval as mmlu_eval
from hookedlm.evals.mmlu import mmlu_prompt as mmlu_prompt
from hookedlm.evals.quick import induction_loss as induction_loss
from hookedlm.evals.quick import sanity_check as sanity_check
