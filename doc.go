// Package crivm holds the rules of the whole tree as tests. The program is in cmd/crivm.
package crivm
