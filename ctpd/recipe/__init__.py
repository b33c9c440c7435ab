"""What a recipe may say, and the functions that read one. Nothing here needs torch."""

from ctpd.recipe.expand import Chosen as Chosen
from ctpd.recipe.expand import ablated as ablated
from ctpd.recipe.expand import choosers as choosers
from ctpd.recipe.expand import expand as expand
from ctpd.recipe.load import key_position as key_position
from ctpd.recipe.load import load_recipe as load_recipe
from ctpd.recipe.load import run_position as run_position
from ctpd.recipe.load import shipped_recipes as shipped_recipes
from ctpd.recipe.model import AblationSpec as AblationSpec
from ctpd.recipe.model import ContrastivePhase as ContrastivePhase
from ctpd.recipe.model import DataSpec as DataSpec
from ctpd.recipe.model import EvaluationSpec as EvaluationSpec
from ctpd.recipe.model import LaunchSpec as LaunchSpec
from ctpd.recipe.model import ModelSpec as ModelSpec
from ctpd.recipe.model import PlainSpec as PlainSpec
from ctpd.recipe.model import Recipe as Recipe
from ctpd.recipe.model import RunSpec as RunSpec
from ctpd.recipe.model import SftPhase as SftPhase
from ctpd.recipe.model import Shared as Shared
from ctpd.recipe.model import Source as Source
from ctpd.recipe.model import Space as Space
from ctpd.recipe.model import TableEntry as TableEntry
from ctpd.recipe.model import TuneSpec as TuneSpec
from ctpd.recipe.model import ablation_run as ablation_run
from ctpd.recipe.model import checked_variables as checked_variables
