"""The command line: sw-transplant inspect | convert | verify | check | report | cache | ladder | erf | cost | recipe.

Read in this order:

    cli           the options of each command, and what the process prints and returns
    command       what every command has: a parser, --json, --traceback
    commands      what each command does
    science       the commands about the papers
    erf           effective receptive fields
    cost          parameters, multiplications, memory
    recipe        published trainings
    certificates  the command check
    pages         the command report
    results       what a command gives back
    data          the images of --data, and what is said of them
    load_model    a model from what the user names: a timm name, a folder, a function
    messages      notes and errors
"""

from sw_transplant.cli.cli import main

__all__ = ["main"]
