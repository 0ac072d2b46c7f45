import sys

from kvshift_megatron.recipes.show import main

sys.exit(main())
