import sys

from kvshift_megatron.planning.command_line import main

sys.exit(main())
