// Package kernelsource carries what builds flint's own kernel from a distribution's source: a script and fragments of a
// configuration. It is files, and must not do anything with them.
package kernelsource

import "embed"

// Files are build.sh and what it wants beside it.
//
//go:embed build.sh common.config x86_64.config arm64.config
var Files embed.FS

// Script is the name of the program among them. Its head says what it takes from its environment.
const Script = "build.sh"
