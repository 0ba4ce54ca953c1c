//go:build race

package server

// raceDetector tells that the tests take several times as long.
const raceDetector = true
