# Looks for an image's own runner in the directories that are the arguments. It is of the user who runs it, and is written to.
set -eu
found=
for dir do
	if [ -x "$dir/bin/Runner.Listener" ]; then
		found=$dir
		break
	fi
done
if [ -z "$found" ]; then
	echo "flint: no runner software (bin/Runner.Listener) in: $*" >&2
	exit 127
fi
cd "$found"

