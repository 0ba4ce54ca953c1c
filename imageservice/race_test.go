//go:build race

package imageservice

const raceEnabled = true
