from kpo_cli.cli import main

main()
