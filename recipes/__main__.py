"""python -m skillvec.recipes CONFIG: the whole pipeline (recipes/past.py)."""

import sys

from skillvec.recipes.past import main

sys.exit(main())
