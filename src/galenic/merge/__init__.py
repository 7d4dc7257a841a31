"""Merging: several experts of one base become one model, without data.

    base ----+--> io: headers only, checked before a weight is read
    experts -+        |
                      v
         statistics: one pass, a T x T Gram matrix of task vectors per tensor; magnitudes: thresholds
                      |                          (norms, cosines, coefficients; remembered by `cache`)
                      v
         engine: blocks of a fixed grid, in several threads (workers), through compiled loops (kernels) or, where
                      |                          rows or matrices are looked at as a whole, methods and spectral
                      v
         writer: safetensors laid out first, blocks put at their place, a journal; visible when whole

Comes in: a recipe in mergekit's words (`config.MergeConfig`) that names Hugging Face folders of one shape. Goes
out: `model/`, a Hugging Face folder, and `merge.json` with norms, cosines, coefficients and warnings, which
`merge-report.html` shows.

A task vector is `tau_t = theta_t - theta_0`: an expert minus its base. The methods and their sources:

* `metagpt`: coefficients in closed form from the norms alone (MetaGPT, arXiv 2406.11385, Theorem 10), for the whole
  model or per layer or tensor, after or before trimming;
* `linear`: weight average (Model Soups, arXiv 2203.05482);
* `task_arithmetic`: `theta_0 + sum lambda_t tau_t` (arXiv 2212.04089);
* `ties`: trim, elect sign, disjoint mean (arXiv 2306.01708);
* `dare_linear`: drop at random and rescale, then task arithmetic (arXiv 2311.03099);
* `dare_ties`: the same, then elect sign and disjoint mean;
* `breadcrumbs`: drop the largest and the smallest entries of every tensor, then task arithmetic (arXiv 2312.06795);
* `della`: drop at random, small entries of a row more often than large ones, then elect sign and mean (arXiv
  2406.11617);
* `sce`: select what varies, coefficients from squares per tensor, erase the minority's signs (arXiv 2408.07990);
* `model_stock`: towards the mean as far as the angle between the experts tells, per tensor (arXiv 2403.19522);
* `slerp`: along the arc from the base to one other model, per tensor;
* `tsv`, `iso_c`, `iso_cts`: in the singular spaces of every matrix (arXiv 2412.00081, arXiv 2502.04959).

In Python: `merge(recipe, out)`, `merge_state_dicts(base, experts, method)`, `gram(base, experts)`,
`metagpt_coefficients(gram)`.
"""

from typing import TYPE_CHECKING, Any

# The function shares its name with the verb file; importing the name here, once, makes `galenic.merge.merge` the
# function whatever is imported first. The file is cheap to import: torch comes when the work starts.
from galenic.merge.merge import merge, merge_state_dicts

if TYPE_CHECKING:
    from galenic.merge.metagpt import metagpt_coefficients
    from galenic.merge.statistics import gram

__all__ = ["gram", "merge", "merge_state_dicts", "metagpt_coefficients"]


def __getattr__(name: str) -> Any:
    if name == "gram":
        from galenic.merge.statistics import gram

        return gram
    if name == "metagpt_coefficients":
        from galenic.merge.metagpt import metagpt_coefficients

        return metagpt_coefficients
    raise AttributeError(f"module 'galenic.merge' has no attribute '{name}'")
