// Signatures of org.pytorch:executorch-android as its sources have them from 1.4.1 to 1.5, for what cards call.
package org.pytorch.executorch.extension.llm

import java.io.Closeable

interface LlmCallback {
    fun onResult(result: String)

    fun onStats(stats: String) {}

    fun onError(errorCode: Int, message: String) {}
}

class LlmModuleConfig private constructor() {
    companion object {
        @JvmStatic fun create(): Builder = Builder()
    }

    class Builder internal constructor() {
        fun modulePath(modulePath: String): Builder = this

        fun tokenizerPath(tokenizerPath: String): Builder = this

        fun temperature(temperature: Float): Builder = this

        fun numBos(numBos: Int): Builder = this

        fun build(): LlmModuleConfig = LlmModuleConfig()
    }
}

class LlmGenerationConfig private constructor() {
    companion object {
        @JvmStatic fun create(): Builder = Builder()
    }

    class Builder internal constructor() {
        fun echo(echo: Boolean): Builder = this

        fun seqLen(seqLen: Int): Builder = this

        fun temperature(temperature: Float): Builder = this

        fun build(): LlmGenerationConfig = LlmGenerationConfig()
    }
}

class LlmModule(config: LlmModuleConfig) : Closeable {
    fun load() {}

    fun generate(prompt: String, config: LlmGenerationConfig, llmCallback: LlmCallback) {}

    fun resetContext() {}

    fun stop() {}

    override fun close() {}
}
