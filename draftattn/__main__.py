from draftattn.cli import main

main()
