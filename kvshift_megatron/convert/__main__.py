import sys

from kvshift_megatron.convert.command_line import main

sys.exit(main())
