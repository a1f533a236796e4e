# To be sourced. Makes wheels that a machine without a package index lacks importable: those in the folder $WHEELS.
# The machine's own torch and triton are used as they are: nothing is installed for the wheels.
wheels=("${WHEELS:-.whl}"/*.whl)
if [ -e "${wheels[0]}" ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}" && export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
