import pathlib

from .judges import JUDGE_NAMES as JUDGE_NAMES
from .judges import Judge as Judge
from .judges import JudgeName as JudgeName
from .judges import create_judge as create_judge
from .judges import judge_file as judge_file
from .judges import load_judge as load_judge
from .scenes import ATTRIBUTES as ATTRIBUTES
from .scenes import SCALES as SCALES
from .scenes import Scene as Scene
from .scenes import caption_words as caption_words
from .scenes import describe as describe
from .scenes import parse_caption as parse_caption
from .scenes import prompts as prompts
from .scenes import scenes_of as scenes_of

PIPELINE_NAME: str
IMAGE_SIZE: int

def pipeline_path() -> pathlib.Path: ...
def judges_path() -> pathlib.Path: ...
