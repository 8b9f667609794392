from dualign.cli import main

main()
