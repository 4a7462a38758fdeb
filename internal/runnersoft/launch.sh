# Runs one job with GitHub's runner in the current directory. The first line of standard input is a secret: the encoded JIT
# configuration; or, if it begins with a brace, a JSON object with which the runner registers itself for one job. It reaches the
# runner by its environment, which only this user and root can read and which the runner clears before a job; it never stands on a
# command line.
IFS= read -r credential

# field NAME: a string of the object; flint's values have no quotes in them.
field() { printf '%s\n' "$credential" | sed -n 's/.*"'"$1"'":"\([^"]*\)".*/\1/p'; }

case $credential in
{*)
	labels=$(printf '%s\n' "$credential" | sed -n 's/.*"labels":\[\([^]]*\)\].*/\1/p' | tr -d '"')
	group=$(field group)
	ACTIONS_RUNNER_INPUT_TOKEN=$(field token) ./bin/Runner.Listener configure --unattended --ephemeral --disableupdate \
		--no-default-labels --url "$(field url)" --name "$(field name)" --labels "$labels" ${group:+--runnergroup "$group"} </dev/null
	;;
*)
	ACTIONS_RUNNER_INPUT_JITCONFIG=$credential
	export ACTIONS_RUNNER_INPUT_JITCONFIG
	;;
esac
unset credential
# Not run.sh: that starts the runner again and again. Its exit code is ours.
exec ./bin/Runner.Listener run </dev/null
