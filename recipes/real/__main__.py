import sys

from skillvec.recipes.real.reproduce import main

sys.exit(main())
