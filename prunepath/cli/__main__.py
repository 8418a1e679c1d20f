from prunepath.cli import main

main()
