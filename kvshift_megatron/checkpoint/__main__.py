import sys

from kvshift_megatron.checkpoint.command_line import main

sys.exit(main())
