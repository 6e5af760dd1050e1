from kpo_cli.cli.main import main

main()
