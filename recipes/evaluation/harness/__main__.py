import sys

from recipes_minigpt4.evaluation.harness import main


sys.exit(main())
